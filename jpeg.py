# SPDX-License-Identifier: BSD-3-Clause
"""The pixels of one box of a JPEG, by jpeg.c: a training crop in half the time that decoding the whole picture takes.

This machine's C compiler, `cc` or $CC, makes the library when it is first needed.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile

import numpy as np

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'jpeg.c')
OPTIONS = ('-O3', '-ffp-contract=off', '-std=gnu99', '-shared', '-fPIC')  # no fused operations: the same pixels everywhere


def load(folder):
    """`decode_box` with its library, which is kept in `folder`; None where it can be neither compiled nor kept."""
    try:
        path = os.path.join(folder, 'jpeg-{}.so'.format(_fingerprint()))
        try:
            _function(path)
        except OSError:  # it is not there, or not whole
            _compile(path)
            _function(path)
    except (OSError, subprocess.CalledProcessError):
        return None
    return functools.partial(decode_box, path)


def compiler():
    """The words that start this machine's C compiler."""
    return shlex.split(os.environ.get('CC') or 'cc')


def _compile(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as scratch:
        made = os.path.join(scratch, 'jpeg.so')
        command = [*compiler(), *OPTIONS, SOURCE, '-o', made, '-lm']
        for native in (['-march=native'], []):  # which some compilers do not know
            finished = subprocess.run(command + native, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL)
            if finished.returncode == 0:
                break
        finished.check_returncode()
        os.replace(made, path)


def decode_box(library, content, box, shrink):
    """The pixels in a box (left, top, right, bottom) of a JPEG at 1/shrink (1, 2, 4 or 8) of its size: (H, W, 3) uint8 in RGB.

    At full size they are libjpeg's but for a rounding here and there, in pictures of more than 4 pixels a side. None where
    the file is not a baseline JPEG in grey or YCbCr, has no such box, ends too early or is damaged where it was read.
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
    digest = hashlib.sha256(' '.join([platform.machine(), *OPTIONS]).encode())
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', 'rb') as file:
            lines = {line for line in file if line.startswith((b'model name', b'flags', b'Features', b'CPU part'))}
        digest.update(b''.join(sorted(lines)))
    with open(SOURCE, 'rb') as file:
        digest.update(file.read())
    return digest.hexdigest()[:24]
