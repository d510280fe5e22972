# SPDX-License-Identifier: BSD-3-Clause
"""Evaluation from several views of each image, as in the VGG paper: ten crops, 50 crops, or all positions (dense).

Simonyan & Zisserman, arXiv:1409.1556, sections 3.2 and 4.3.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F

VIEWS = ["center", "ten-crop", "dense", "multi-crop"]


class ViewAverage:
    """Predicts from the mean of the softmax outputs of all views of an image.

    Args:
        network: a vgg.VGG.
        normalize: from (n, H, W, 3) uint8 to (n, 3, H, W) on the device.
        view: center, ten-crop, dense or multi-crop.
        size: pixels per side of a crop.
        mirrored: also use the mirror image (not for center).
    """

    def __init__(
        self, network: Any, normalize: Callable[[torch.Tensor], torch.Tensor], *, view: str, size: int, mirrored: bool
    ) -> None:
        self.network, self.normalize, self.view, self.size = network, normalize, view, size
        self.mirrored = mirrored and view != "center"

    def __call__(self, groups: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Return logits (N, classes): the logarithms of the mean probabilities, whose softmax is that mean.

        The sum is taken in logarithms, because a very small probability is 0 in fp32.
        """
        parts: dict[int, list[torch.Tensor]] = {}
        for positions, pixels in groups:
            scores = self._log_probabilities(self.normalize(pixels))
            for position, score in zip(positions.tolist(), scores):
                parts.setdefault(position, []).append(score)
        return torch.stack([_log_mean_exp(torch.stack(parts[position])) for position in sorted(parts)])

    def _log_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, classes): the mean over the views of one scale."""
        scores = []
        height, width = images.shape[-2:]
        for side in [images, images.flip(3)] if self.mirrored else [images]:
            if self.view == "dense":
                scores.append(self.network.forward_dense(side, self.size))
            else:
                for top, left in crop_positions(self.view, height, width, self.size):
                    scores.append(self.network(side[..., top : top + self.size, left : left + self.size]))
        return _log_mean_exp(F.log_softmax(torch.stack(scores).float(), dim=2))


def crop_positions(view: str, height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return (top, left) of each crop; the ten-crop view's five are those of torchvision's FiveCrop."""
    bottom, right = height - size, width - size
    center = int(round(bottom / 2.0)), int(round(right / 2.0))
    if view == "center":
        return [center]
    if view == "ten-crop":
        return [(0, 0), (0, right), (bottom, 0), (bottom, right), center]
    return [(round(bottom * i / 4), round(right * j / 4)) for i in range(5) for j in range(5)]  # multi-crop


def _log_mean_exp(scores: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mean over the first dimension, of values given by their logarithms."""
    return scores.logsumexp(0) - math.log(len(scores))
