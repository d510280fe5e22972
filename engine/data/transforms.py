# SPDX-License-Identifier: BSD-3-Clause
"""From a file's bytes, or a small array, to the pixels that the model sees: validation, training.

Images are (H, W, 3) uint8 arrays. They are normalized on the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator

from engine.data.decoding import MAX_PIXELS, MAX_RATIO, Source, UnreadableError, open_image, read_rgb, to_rgb, turn_of
from engine.versions import TORCH

import numpy as np
import torch
from PIL import Image
from torch import nn

try:
    import simplejpeg  # libjpeg-turbo; its pixels are those of current Pillow, in less time
except ImportError:
    simplejpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE_TO_CROP = 256 / 224  # validation resizes the short side to 256 for a crop of 224
CROP_RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop: width / height
PADDING = 4  # pixels around CIFAR-10's images and the digits
BILINEAR, FLIP_LEFT_RIGHT = 2, 0  # Pillow has renamed the constants, not their values

# Principal components of the RGB values of ImageNet's training images, in [0, 1], and the standard deviation of each;
# the values of facebookarchive/fb.resnet.torch, datasets/imagenet.lua. Rows: R, G, B.
COLOR_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
COLOR_COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


# --- validation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What validation does to each image, and checkpoints hold: resize the short side and crop the center.

    That is torchvision's Resize(round(size · 256 / 224)) and CenterCrop(size), bit for bit.

    Args:
        image_size: pixels per side.
        crop: False resizes the whole image instead.
        mean, std: of each channel, for pixels in [0, 1], for the normalization on the device.
        exif_rotate: turn images upright, as their EXIF data says.
    """

    image_size: int = 224
    crop: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    exif_rotate: bool = False

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Return that of a checkpoint; what it does not say is as for ImageNet."""
        known = {**vars(Preprocessing()), **values}
        mean, std = tuple(known["mean"]), tuple(known["std"])
        return Preprocessing(int(known["image_size"]), bool(known["crop"]), mean, std, bool(known["exif_rotate"]))

    def to_dict(self) -> dict[str, Any]:
        values = {"image_size": self.image_size, "crop": self.crop, "mean": list(self.mean), "std": list(self.std)}
        return {**values, **({"exif_rotate": True} if self.exif_rotate else {})}

    @property
    def short_side(self) -> int:
        """The short side, in pixels, of the image that the crop is taken from."""
        return round(self.image_size * RESIZE_TO_CROP) if self.crop else self.image_size

    def __call__(self, source: Source, rng: object = None) -> np.ndarray:
        """Return (S, S, 3) uint8. rng: unused; the transform of training images has it."""
        size = self.image_size
        if not self.crop:
            return resize(np.asarray(read_rgb(source, self.exif_rotate)), size)
        image = resize_short_side(read_rgb(source, self.exif_rotate), self.short_side)
        left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
        return np.asarray(image.crop((left, top, left + size, top + size)))


def whole_image(source: Source, scale: int, exif_rotate: bool = False) -> np.ndarray:
    """Return the uncropped image, its short side `scale` pixels: (H, W, 3) uint8."""
    return np.asarray(resize_short_side(read_rgb(source, exif_rotate), scale))


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Resize an image as torchvision's Resize(short_side). Raises UnreadableError for more than MAX_PIXELS."""
    width, height = image.size
    if width <= height:
        resized = short_side, int(short_side * height / width)
    else:
        resized = int(short_side * width / height), short_side
    if resized[0] * resized[1] > MAX_PIXELS:
        raise UnreadableError(f"too thin: resized, it would have {resized[0]} × {resized[1]} pixels")
    return image.resize(resized, BILINEAR) if resized != image.size else image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Return the whole image, resized to (size, size, 3)."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), BILINEAR))


# --- training ---------------------------------------------------------------------------------------------------------


class Augmentation:
    """What training does to each image: the steps below, in this order. A new augmentation is a new step.

    Every draw comes from the generator of the image, so a resumed run repeats it.

    Args:
        image_size: pixels per side.
        crop_scale: of a file, the crop takes this share of the area (torchvision's RandomResizedCrop), or,
        train_scale: the short side is resized to a length drawn from this range before: the paper's scale jitter
            (Simonyan & Zisserman, arXiv:1409.1556, section 3.1).
        hflip: probability of a horizontal flip.
        color_shift: add a random color.
        auto_augment: a key of POLICIES.
        random_erasing, fill: probability, and RGB of erased pixels.
        exif_rotate: turn images upright first, as their EXIF data says.
    """

    CROP_SCALE = (0.08, 1.0)
    POLICIES = {"ta_wide": "TrivialAugmentWide", "ra": "RandAugment", "aa": "AutoAugment"}  # of torchvision
    decoder = "simplejpeg" if simplejpeg is not None else "Pillow"  # of JPEGs; the two may differ by a gray level

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: tuple[float, float] | None = None,
        train_scale: tuple[int, int] | None = None,
        hflip: float = 0.5,
        color_shift: bool = False,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        fill: tuple[int, ...] = (0, 0, 0),
        exif_rotate: bool = False,
    ) -> None:
        self.image_size, self.hflip, self.exif_rotate = image_size, hflip, exif_rotate
        self.crop_scale, self.train_scale = crop_scale or self.CROP_SCALE, train_scale
        self.steps: list[Callable[[Any, np.random.RandomState], np.ndarray]] = [self._crop]
        if color_shift:
            self.steps.append(shift_colors)
        if auto_augment or random_erasing:
            from torchvision import transforms

            chosen: list[Any] = []
            if auto_augment:
                policy = getattr(transforms, self.POLICIES[auto_augment])
                # As torchvision's references do; the policies' own default is nearest.
                chosen.append(policy(interpolation=transforms.InterpolationMode.BILINEAR))
            if random_erasing:
                chosen.append(transforms.RandomErasing(random_erasing, value=fill))
            self.steps.append(functools.partial(apply_torchvision, chosen))

    def __call__(self, source: Source, rng: np.random.RandomState) -> np.ndarray:
        """Return (S, S, 3) uint8."""
        for step in self.steps:
            source = step(source, rng)
        return np.asarray(source)

    def _crop(self, source: Source, rng: np.random.RandomState) -> np.ndarray:
        """Decode a file and return a random crop of it, resized and perhaps mirrored; of a small array, see below."""
        if not isinstance(source, bytes):
            return random_padded_crop(source, self.image_size, self.hflip, rng)
        turned = self.exif_rotate and turn_of(open_image(source)) is not None
        upright = read_rgb(source, exif_rotate=True) if turned else None
        jpeg_size = None if upright else _jpeg_size(source)
        width, height = upright.size if upright else jpeg_size or open_image(source).size
        if self.train_scale:
            box = random_scale_box(width, height, self.image_size, self.train_scale, rng)
        else:
            box = random_crop_box(width, height, self.crop_scale, rng)
        flip = rng.random_sample() < self.hflip
        if upright:
            return _pillow_resize_crop(upright, box, self.image_size, flip)
        return decode_crop(source, jpeg_size, box, self.image_size, flip)


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Return the box (left, top, right, bottom) in pixels, drawn like torchvision's RandomResizedCrop.

    Szegedy et al., arXiv:1409.4842.
    """
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
    """Return the box, before resizing, of a crop of `size` after the short side was resized to a length of `scale`."""
    short_side = rng.randint(scale[0], scale[1] + 1)
    side = max(1, int(round(min(width, height) * size / short_side)))
    left, top = rng.randint(0, width - side + 1), rng.randint(0, height - side + 1)
    return left, top, left + side, top + side


def decode_crop(
    content: bytes, jpeg_size: tuple[int, int] | None, box: tuple[int, int, int, int], size: int, flip: bool
) -> np.ndarray:
    """Decode a file and return a box of it, resized to (size, size, 3) and perhaps mirrored.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box is at least that many times larger than the output.
    jpeg_size: what _jpeg_size returns.
    """
    shrink = 1
    while shrink < 8 and min(box[2] - box[0], box[3] - box[1]) >= 2 * shrink * size:
        shrink *= 2
    if jpeg_size is not None:
        width, height = (-(-edge // shrink) for edge in jpeg_size)
        pixels = None
        with contextlib.suppress(Exception):  # what simplejpeg cannot decode, Pillow can, or says why
            pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width)
        if pixels is not None:
            return resize_crop(pixels, tuple(int(round(edge / shrink)) for edge in box), size, flip)
    image = open_image(content)
    width, height = image.size
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
    if colorspace not in ("YCbCr", "Gray") or width * height > MAX_PIXELS:
        return None
    return (width, height) if max(width, height) <= MAX_RATIO * min(width, height) else None  # Pillow says why not


def _pillow_resize_crop(image: Any, box: tuple[float, ...], size: int, flip: bool) -> np.ndarray:
    """Resize a box of a Pillow image or an array to (size, size, 3), and mirror it if `flip`."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.resize((size, size), BILINEAR, box=box)
    return np.asarray(image.transpose(FLIP_LEFT_RIGHT) if flip else image)


def _torch_resize_crop(pixels: np.ndarray, box: tuple[int, ...], size: int, flip: bool) -> np.ndarray:
    """The same by torch, faster; the mean difference from Pillow's BILINEAR is 0.03 gray levels."""
    left, top, right, bottom = box
    # Sliced after the batch dimension, torch sees channels last and writes channels last: it saves 0.17 ms per image.
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


def shift_colors(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Add one color to all pixels of (H, W, 3) uint8, drawn along the principal components of ImageNet's colors.

    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section 4.1.
    """
    shift = COLOR_COMPONENTS @ (rng.normal(0, 0.1, 3) * COLOR_DEVIATIONS)
    table = np.arange(256)[:, None] + 255 * shift  # the new value of each value, for R, G and B
    table = table.round().clip(0, 255).astype(np.uint8)
    return np.stack([table[image[..., channel], channel] for channel in range(3)], -1)


def apply_torchvision(transforms: list[Any], image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Apply transforms of torchvision, which draw from torch's generator, to (H, W, 3) uint8."""
    with seeded(int(rng.randint(2**31))):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for transform in transforms:
            pixels = transform(pixels)
        return pixels.permute(1, 2, 0).numpy()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch's CPU generator starts at a seed; it continues afterwards as if nothing had happened."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
