# SPDX-License-Identifier: BSD-3-Clause
"""The pixels of one box of a JPEG, by jpeg.c: a training crop in half the time that decoding the whole picture takes.

This machine's C compiler, `cc` or $CC, makes the library when it is first needed.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile

import numpy as np

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'jpeg.c')
# Without fused operations every processor makes the same pixels.
OPTIONS = ('-O3', '-march=native', '-ffp-contract=off', '-std=gnu99', '-shared', '-fPIC')


def load(folder):
    """`decode_box` with its library, which is kept in `folder`; None without a compiler or where nothing can be written."""
    try:
        path = os.path.join(folder, 'jpeg-{}.so'.format(_fingerprint()))
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = os.path.join(scratch, 'jpeg.so')
                subprocess.run([os.environ.get('CC') or 'cc', *OPTIONS, SOURCE, '-o', made, '-lm'], check=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                os.replace(made, path)
        _function(path)
    except (OSError, subprocess.CalledProcessError):
        return None
    return functools.partial(decode_box, path)


def decode_box(library, content, box, shrink):
    """The pixels in a box (left, top, right, bottom) of a JPEG at 1/shrink (1, 2, 4 or 8) of its size: (H, W, 3) uint8 in RGB.

    At full size they are libjpeg's, but for a rounding here and there. None where the file is not a baseline JPEG in grey or
    YCbCr, has no such box, ends too early or is damaged where it was read.
    """
    left, top, right, bottom = box
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    failed = _function(library)(content, len(content), shrink, left, top, right, bottom, pixels.ctypes.data)
    return None if failed else pixels


@functools.lru_cache(maxsize=None)
def _function(path):
    function = ctypes.CDLL(path).decode_box
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t] + 5 * [ctypes.c_int] + [ctypes.c_void_p]
    return function


def _fingerprint():
    """Of the source and of this kind of processor: a home folder may be shared by machines of several kinds."""
    parts = [platform.machine(), *OPTIONS]
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            parts += sorted({line for line in file if line.startswith(('model name', 'flags', 'Features', 'CPU part'))})
    with open(SOURCE) as file:
        return hashlib.sha256('\n'.join(parts + [file.read()]).encode()).hexdigest()[:24]
