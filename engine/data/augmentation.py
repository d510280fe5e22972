# SPDX-License-Identifier: BSD-3-Clause
"""How training images are varied: one by one in the loader, or mixed with each other on the device.

Every draw depends on (seed, epoch, image) or (seed, epoch, batch) alone, so that a resumed run repeats it.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Iterator

from engine.errors import UsageError
from engine.versions import TORCH

import numpy as np
import torch

AUTO_AUGMENT = {"ta_wide": "TrivialAugmentWide", "ra": "RandAugment", "aa": "AutoAugment"}
CROP_SCALE = (0.08, 1.0)  # share of the image's area, as torchvision's RandomResizedCrop

# Principal components of the RGB values of ImageNet's training images, in [0, 1], and the standard deviation of each;
# the values of facebookarchive/fb.resnet.torch, datasets/imagenet.lua. Rows: R, G, B.
COLOR_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
COLOR_COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass
class Augmentation:
    """What training does to each image.

    crop_scale, train_scale: of a folder's images. random_resized_crop takes a share of the area, or, if train_scale is
    given, a crop after the short side was resized to a length drawn from that range: the paper's scale jitter
    (Simonyan & Zisserman, arXiv:1409.1556, section 3.1).
    """

    crop_scale: tuple[float, float] = CROP_SCALE
    train_scale: tuple[int, int] | None = None  # pixels
    hflip: float = 0.5  # probability of a horizontal flip
    color_shift: bool = False
    auto_augment: str | None = None
    random_erasing: float = 0.0  # probability
    fill: tuple[int, ...] = (0, 0, 0)  # RGB of erased pixels

    def __post_init__(self) -> None:
        self.transforms: list[Any] = []  # on (3, H, W) uint8
        if self.auto_augment or self.random_erasing:
            from torchvision import transforms

            if self.auto_augment:
                policy = getattr(transforms, AUTO_AUGMENT[self.auto_augment])
                # As torchvision's references do; the policies' own default is nearest.
                self.transforms.append(policy(interpolation=transforms.InterpolationMode.BILINEAR))
            if self.random_erasing:
                self.transforms.append(transforms.RandomErasing(self.random_erasing, value=self.fill))

    def vary(self, image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        """Return a cropped image, (S, S, 3) uint8, with its colors shifted, augmented and partly erased."""
        if self.color_shift:
            image = shift_colors(image, rng)
        if self.transforms:
            with seeded(int(rng.randint(2**31))):
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                for transform in self.transforms:
                    pixels = transform(pixels)
                image = pixels.permute(1, 2, 0).numpy()
        return image


def shift_colors(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Add one color to all pixels of (H, W, 3) uint8, drawn along the principal components of ImageNet's colors.

    Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section
    4.1.
    """
    shift = COLOR_COMPONENTS @ (rng.normal(0, 0.1, 3) * COLOR_DEVIATIONS)
    table = np.arange(256)[:, None] + 255 * shift  # the new value of each value, for R, G and B
    table = table.round().clip(0, 255).astype(np.uint8)
    return np.stack([table[image[..., channel], channel] for channel in range(3)], -1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch's CPU generator starts at a seed; it continues afterwards as if nothing had happened."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class BatchMixer:
    """Mixes each image of a batch with the one before it, by torchvision's MixUp and CutMix.

    Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899. One of the two is drawn per batch if both are given.
    The batch is a slice of the global batch with the image before it in front, so that the result does not depend on
    the number of processes.

    Args:
        mixup, cutmix: alpha of the Beta distribution, 0 for off.
        classes: number of classes.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        from torchvision.transforms import v2

        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.transform = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha])
        self.seed = seed

    def __call__(
        self, images: torch.Tensor, target: torch.Tensor, epoch: int, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (images (N, 3, S, S), target (N, classes) float32) of N + 1 images and targets."""
        rng = np.random.RandomState([self.seed, epoch, batch])
        with seeded(int(rng.randint(2**31))):
            images, target = self.transform(images, target)
        return images[1:], target[1:]


def require_torchvision(flag: str) -> None:
    """Raise UsageError if the transforms of a flag are not there."""
    if TORCH < (2, 1):
        raise UsageError(f"{flag} requires torch 2.1 or later, this is {torch.__version__}: leave it out")
    if importlib.util.find_spec("torchvision") is None:
        raise UsageError(f"{flag} requires torchvision: pip install torchvision")
