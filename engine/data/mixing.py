# SPDX-License-Identifier: BSD-3-Clause
"""Mixing the images of a batch with each other, on the device."""

from __future__ import annotations

from engine import console
from engine.data.transforms import seeded

import numpy as np
import torch


class BatchMixer:
    """Mixes each image of a batch with the one before it, by torchvision's MixUp and CutMix.

    Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899. One of the two is drawn per batch if both are given.
    The batch is a slice of the global batch with the image before it in front, so that the result does not depend on
    the number of processes. Every draw depends on (seed, epoch, batch) alone, so that a resumed run repeats it.

    Args:
        mixup, cutmix: alpha of the Beta distribution, 0 for off.
        classes: number of classes.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        from torchvision.transforms import v2

        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.transform = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha])
        self.seed = seed
        console.line("=> images are mixed: the training accuracy is that of the larger part of each")

    def __call__(
        self, images: torch.Tensor, target: torch.Tensor, epoch: int, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (N, 3, S, S) and target (N, classes) float32 of N + 1 images and targets."""
        rng = np.random.RandomState([self.seed, epoch, batch])
        with seeded(int(rng.randint(2**31))):
            images, target = self.transform(images, target)
        return images[1:], target[1:]
