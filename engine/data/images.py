# SPDX-License-Identifier: BSD-3-Clause
"""From a file's bytes to the pixels that the model sees: decoding, cropping, resizing, mirroring.

Images are (H, W, 3) uint8 arrays. ComputeDevice.normalizer does the rest on the device.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import IO, Any

from engine.data.augmentation import Augmentation
from engine.versions import TORCH

import numpy as np
import torch
from PIL import Image
from torch import nn

try:
    import simplejpeg  # libjpeg-turbo; its pixels are those of current Pillow, in less time
except ImportError:
    simplejpeg = None

CROP_RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop: width / height
RESIZE_TO_CROP = 256 / 224  # validation resizes the short side to 256 for a crop of 224
PADDING = 4  # pixels around CIFAR-10's images and the digits
MAX_PIXELS = 178956970  # Pillow, too, calls more than this a decompression bomb
BILINEAR, FLIP_LEFT_RIGHT = 2, 0  # Pillow has renamed the constants, not their values

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides


def decoder_name() -> str:
    """Return the JPEG decoder of training images. Pixels can differ by a gray level between the two."""
    return "simplejpeg" if simplejpeg is not None else "Pillow"


# --- reading files ----------------------------------------------------------------------------------------------------


def open_image(file: IO[bytes]) -> Image.Image:
    """Return a Pillow image that is not decoded yet.

    Raises:
        ValueError: if the header claims more than MAX_PIXELS.
        Exception: Pillow raises nearly any type for a corrupt file.
    """
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"its header claims {image.width} × {image.height} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert like torchvision's loader; 16-bit images keep their upper byte (Pillow would clip at 255)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_rgb(path: str | bytes) -> Image.Image:
    """Return a file as an RGB Pillow image. Raises what open_image raises."""
    with open(path, "rb") as file:
        return to_rgb(open_image(file))


def reason_of(error: Exception) -> str:
    """Return what went wrong with a file, on one line."""
    text = str(error).partition("<")[0].replace("\n", " ").strip()
    return getattr(error, "strerror", None) or text or type(error).__name__


# --- training ---------------------------------------------------------------------------------------------------------


def random_resized_crop(
    content: bytes, size: int, rng: np.random.RandomState, augmentation: Augmentation
) -> np.ndarray:
    """Decode a file and return a random crop of it, resized to (size, size, 3) and perhaps mirrored.

    Szegedy et al., arXiv:1409.4842, as torchvision's RandomResizedCrop and RandomHorizontalFlip, or the VGG paper's
    scale jitter. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop is at least that many times larger than
    the output.
    """
    jpeg_size = _jpeg_size(content)
    width, height = jpeg_size or open_image(io.BytesIO(content)).size
    if augmentation.train_scale:
        box = random_scale_box(width, height, size, augmentation.train_scale, rng)
    else:
        box = random_crop_box(width, height, augmentation.crop_scale, rng)
    flip = rng.random_sample() < augmentation.hflip
    shrink = 1
    while shrink < 8 and min(box[2] - box[0], box[3] - box[1]) >= 2 * shrink * size:
        shrink *= 2
    pixels = None if jpeg_size is None else _decode_jpeg(content, width, height, shrink)
    if pixels is not None:
        left, top, right, bottom = (int(round(edge / shrink)) for edge in box)
        return resize_crop(pixels, (left, top, right, bottom), size, flip)
    image = open_image(io.BytesIO(content))
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))  # does nothing for other formats than JPEG
    x, y = image.width / width, image.height / height
    return _pillow_resize_crop(to_rgb(image), (box[0] * x, box[1] * y, box[2] * x, box[3] * y), size, flip)


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that simplejpeg can decode to RGB, else None."""
    if simplejpeg is None:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (width, height) if colorspace in ("YCbCr", "Gray") and width * height <= MAX_PIXELS else None


def _decode_jpeg(content: bytes, width: int, height: int, shrink: int) -> np.ndarray | None:
    """(H, W, 3) uint8 pixels of a JPEG at 1/shrink of its size; None if simplejpeg cannot: Pillow then says why."""
    try:
        return simplejpeg.decode_jpeg(content, "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink))
    except ValueError:
        return None


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) in pixels, drawn like torchvision's RandomResizedCrop."""
    area = width * height
    for _ in range(10):
        crop_area = area * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = int(round(math.sqrt(crop_area * ratio))), int(round(math.sqrt(crop_area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w + 1), rng.randint(0, height - h + 1)
            return left, top, left + w, top + h
    # Ten boxes did not fit: take the largest central one inside the ratios.
    w = min(width, int(round(height * CROP_RATIO[1])))
    h = min(height, int(round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_scale_box(
    width: int, height: int, size: int, scale: tuple[int, int], rng: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Return the box, in the pixels of the original, of a random crop of `size` after its short side was resized.

    scale: the smallest and largest length of the short side, which is drawn.
    """
    short_side = rng.randint(scale[0], scale[1] + 1)
    side = max(1, int(round(min(width, height) * size / short_side)))
    left, top = rng.randint(0, width - side + 1), rng.randint(0, height - side + 1)
    return left, top, left + side, top + side


def _pillow_resize_crop(image: Any, box: tuple[float, ...], size: int, flip: bool) -> np.ndarray:
    """Resize a box of a Pillow image or an array to (size, size, 3), and mirror it if `flip`."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.resize((size, size), BILINEAR, box=box)
    return np.asarray(image.transpose(FLIP_LEFT_RIGHT) if flip else image)


def _torch_resize_crop(pixels: np.ndarray, box: tuple[int, ...], size: int, flip: bool) -> np.ndarray:
    """The same by torch, faster; the mean difference from Pillow's BILINEAR is 0.03 gray levels."""
    left, top, right, bottom = box
    # The batch dimension comes before the slicing, so that torch sees channels last: it then writes channels last too,
    # which saves 0.17 ms per image.
    crop = torch.from_numpy(pixels).unsqueeze(0)[:, top:bottom, left:right].permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return (resized.flip(1) if flip else resized).numpy()


resize_crop = _torch_resize_crop if TORCH >= (2, 1) else _pillow_resize_crop  # older torch resizes no uint8


def random_padded_crop(image: np.ndarray, size: int, hflip: float, rng: np.random.RandomState) -> np.ndarray:
    """Pad a small image with black, crop it at random, mirror it with a probability, resize to (size, size, 3).

    Lee et al., "Deeply-Supervised Nets", arXiv:1409.5185.
    """
    height, width = image.shape[:2]
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), "constant")
    top, left = rng.randint(0, 2 * PADDING + 1, 2)
    crop = padded[top : top + height, left : left + width]
    if hflip and rng.random_sample() < hflip:
        crop = crop[:, ::-1]
    return resize(crop, size)


# --- validation -------------------------------------------------------------------------------------------------------


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return (size, size, 3): torchvision's Resize(round(size · 256 / 224)) and CenterCrop(size), bit for bit."""
    image = resize_short_side(image, default_scale(size))
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size)))


def default_scale(size: int) -> int:
    """Return the short side, in pixels, of the image that a crop of `size` is taken from."""
    return round(size * RESIZE_TO_CROP)


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Resize an image as torchvision's Resize(short_side)."""
    width, height = image.size
    if width <= height:
        resized = short_side, int(short_side * height / width)
    else:
        resized = int(short_side * width / height), short_side
    return image.resize(resized, BILINEAR) if resized != image.size else image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Return the whole image, resized to (size, size, 3)."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), BILINEAR))
