# SPDX-License-Identifier: BSD-3-Clause
"""From a file to an RGB image: which files are images, and which are refused."""

from __future__ import annotations

import contextlib
import io
import mmap
import warnings
from typing import Any, Iterator, Union

from engine import console
from engine.errors import printable

import numpy as np
from PIL import Image, PngImagePlugin

Source = Union[bytes, np.ndarray]  # a file's content, or (H, W, 3) uint8
EXIF_ORIENTATION = 0x0112
# From the camera's orientation to Pillow's transposition, by number as in Pillow's ImageOps.exif_transpose.
TRANSPOSITIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
MAX_PIXELS = 178956970  # Pillow, too, calls more than this a decompression bomb
MAX_RATIO = MAX_PIXELS / 256**2  # width to height: resized to a short side of 256, such an image has MAX_PIXELS

# For the whole process, because a filter around each call would not be safe in threads. open_image refuses too many
# pixels; of transparency and damaged EXIF data, which nobody reads, Pillow would warn without naming the file. The one
# that stays names a format that this Pillow lacks.
warnings.filterwarnings("ignore", "(?!image file could not be identified)", module=r"PIL\.")
# Comments and color profiles of a PNG: 64 MiB each, as together, not 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_warned_of_dark = mmap.mmap(-1, 1)  # shared with DataLoader workers, so that one of them says it


class UnreadableError(ValueError):
    """What cannot be read as an image. An error of another type is a fault of the program, not of the file."""


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """A context, or a decorator, for reading and decoding: any error in it is an UnreadableError."""
    try:
        yield
    except Exception as error:  # Pillow raises nearly any type for a corrupt file
        raise UnreadableError(reason_of(error)) from error


class FileContent(bytes):
    """The bytes of a file, with its path for messages."""

    path = ""


def read_file(path: str | bytes) -> FileContent:
    with open(path, "rb", buffering=0) as file:
        content = FileContent(file.read())
    content.path = printable(path)
    return content


@unreadable()
def open_image(content: bytes) -> Image.Image:
    """Return a Pillow image that is not decoded yet, except a TIFF on its side. Raises UnreadableError.

    Also if the header claims more than MAX_PIXELS, or that many once the short side is resized to 256, or if pixels
    are of 32 bits: nobody knows which value is white.
    """
    image: Any = Image.open(io.BytesIO(content))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"its header claims {image.width} × {image.height} pixels")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"too thin: {image.width} × {image.height} pixels")
    # Pillow's mode for 16 bits is I;16, but in some versions I for these two formats.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its pixels are 32-bit or signed integers, or floats: convert it to 8 bits")
    image.filename = getattr(content, "path", "")
    if image.format == "TIFF" and image.tag_v2.get(EXIF_ORIENTATION) in (5, 6, 7, 8):
        image.load()  # Pillow turns it; before version 11 it swaps width and height only now
    return image


@unreadable()
def to_rgb(image: Any) -> Image.Image:
    """Decode and convert like torchvision's loader; 16-bit images keep their upper byte (Pillow would clip at 255)."""
    has_16_bits, path = image.mode.startswith("I") or ";16" in str(image.tile), image.filename
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    if has_16_bits and not _warned_of_dark[0] and max(high for _, high in image.getextrema()) < 4096 // 256:
        _warned_of_dark[0] = 1
        console.warning_once_per_node(
            f"{path}: a 16-bit image whose values stay below 4096, so it is read as black; if there are more like it, "
            "scale their values to 16 bits, or convert them to 8 bits"
        )
    return image


def orientation_of(image: Any) -> Any:
    """Return the camera's orientation in the EXIF data of an image, or None."""
    with contextlib.suppress(Exception):  # a tag that cannot be read is no reason to refuse an image
        return image.getexif().get(EXIF_ORIENTATION)
    return None


def turn_of(image: Any) -> Any:
    """Return the transposition that turns an image upright, as its EXIF data says, or None."""
    return TRANSPOSITIONS.get(orientation_of(image))


def read_rgb(source: Source, exif_rotate: bool = False) -> Image.Image:
    """Return an RGB Pillow image; exif_rotate: upright, as the EXIF data says. Raises UnreadableError."""
    if not isinstance(source, bytes):
        return Image.fromarray(source)
    image = open_image(source)
    rgb = to_rgb(image)
    turn = turn_of(image) if exif_rotate else None  # after decoding: Pillow itself turns a TIFF, and drops its tag
    return rgb if turn is None else rgb.transpose(turn)


def reason_of(error: Exception) -> str:
    """Return what went wrong with a file, on one line."""
    text = str(error).partition("<")[0].replace("\n", " ").strip()
    return getattr(error, "strerror", None) or text or type(error).__name__
