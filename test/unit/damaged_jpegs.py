# SPDX-License-Identifier: BSD-3-Clause
"""jpeg.c, made to stop at the first access out of bounds and the first undefined step, on files damaged at random.

Prints how many it refused and how many it read. To be started with the compiler's libasan.so preloaded (test_images.py).
"""
import ctypes
import functools
import io
import os
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import images  # noqa: E402
import jpeg  # noqa: E402

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def decode(library, content, box, shrink):
    """Whether it was read. Memory for the file and the pixels is no larger than they are, so that the byte behind is seen."""
    left, top, right, bottom = box
    data, pixels = libc.malloc(len(content)), libc.malloc(3 * (right - left) * (bottom - top))
    ctypes.memmove(data, content, len(content))
    try:
        return not jpeg._function(library)(ctypes.c_char_p(data), len(content), shrink, left, top, right, bottom, pixels)
    finally:
        libc.free(data)
        libc.free(pixels)


def damaged(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        where, kind = rng.randint(len(content)), rng.randint(4)
        if kind == 0:
            content[where] = rng.randint(256)
        elif kind == 1:
            content[rng.randint(min(len(content), 700))] = rng.randint(256)  # in the headers
        elif kind == 2:
            del content[where:where + rng.randint(1, 9)]
        elif len(content) > 100:
            del content[max(where, 100):]
    return bytes(content) + b'\xff\xd9'


def main():
    jpeg.OPTIONS = ('-O1', '-g', '-std=gnu99', '-shared', '-fPIC', '-fsanitize=address,undefined', '-fno-sanitize-recover=all')
    decode_box = jpeg.load(images.cache_folder())
    assert decode_box is not None
    read_it = functools.partial(decode, *decode_box.args)
    rng, read = np.random.RandomState(0), [0, 0]
    for _ in range(3000):
        width, height = rng.randint(1, 140, 2)
        image = Image.fromarray(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        image = image.convert('L') if rng.random_sample() < 0.2 else image
        file = io.BytesIO()
        options = {'restart_marker_blocks': int(rng.randint(1, 9))} if rng.random_sample() < 0.3 else {}
        image.save(file, 'JPEG', quality=int(rng.choice([10, 75, 97])), subsampling=int(rng.randint(3)), **options)
        shrink = int(rng.choice([1, 2, 4, 8]))
        left, top = rng.randint(-(-width // shrink)), rng.randint(-(-height // shrink))
        right, bottom = rng.randint(left + 1, -(-width // shrink) + 1), rng.randint(top + 1, -(-height // shrink) + 1)
        read[read_it(damaged(file.getvalue(), rng), (left, top, right, bottom), shrink)] += 1
    print(*read)


main()
