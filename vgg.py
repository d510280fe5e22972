# SPDX-License-Identifier: BSD-3-Clause
"""VGG-11, 13, 16 and 19, with and without batch normalization, and the other names that their weights go by.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556, table 1.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from itertools import accumulate
from typing import Sequence

import torch
from torch import nn

# Convolutions in each of the five stages: columns A, B, D and E of the paper's table 1.
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)  # output channels of each stage
HIDDEN = 4096  # of the two hidden linear layers
ARCHITECTURES = sorted(DEPTHS) + sorted(f"{name}_bn" for name in DEPTHS)
LAST_LAYER = "classifier.6"


class VGG(nn.Module):
    """Images to logits.

    Layer numbers, and so parameter names, are torchvision's. Each stage's last ReLU comes after its max-pool, where
    torchvision has it before: the two commute exactly, and the ReLU then touches a quarter of the memory.
    """

    def __init__(
        self, arch: str = "vgg16", num_classes: int = 1000, widths: Sequence[int] = WIDTHS, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.features = _features(DEPTHS[arch.replace("_bn", "")], widths, batch_norm=arch.endswith("_bn"))
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )
        self.apply(_initialize)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W) floating point, normalized, H and W at least 32. Returns logits (N, num_classes)."""
        return self.classify(self.features(images))

    def forward_dense(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """Return the mean of the logits at all positions of larger images, for a network trained on `size` pixels.

        The linear layers slide over the maps, one position every 32 pixels: convolutions, as in the paper's section
        3.2. images: (N, 3, H, W), H and W at least `size`. Returns (N, num_classes).
        """
        maps, side = self.features(images), size // 32
        windows = maps.unfold(2, side, 1).unfold(3, side, 1)  # (N, 512, rows, columns, side, side)
        logits = self.classify(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return logits.view(len(images), -1, logits.shape[1]).mean(1)

    def classify(self, maps: torch.Tensor) -> torch.Tensor:
        """maps: (N, 512, h, w), the output of `features`. Returns logits (N, num_classes)."""
        maps = _average_pool_7x7(maps)
        # The weights of classifier.0 expect (C, H, W) order, whatever the memory format.
        return self.classifier(torch.flatten(maps.contiguous(), 1))


def _features(depths: tuple[int, ...], widths: Sequence[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for depth, width in zip(depths, widths):
        for position in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            if position == depth - 1:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            layers.append(nn.ReLU(inplace=True))
            channels = width
    return nn.Sequential(*layers)


def _average_pool_7x7(maps: torch.Tensor) -> torch.Tensor:
    """Average (N, C, H, W) to (N, C, 7, 7). At 224 pixels the maps are 7×7 already, at 32 they are single points."""
    height, width = maps.shape[-2:]
    if (height, width) == (7, 7):
        return maps
    if (height, width) == (1, 1):
        return maps.expand(-1, -1, 7, 7)
    # The values of F.adaptive_avg_pool2d, computed by means whose backward pass is deterministic on a GPU too.
    for dim, length in ((2, height), (3, width)):
        bins = [(length * i // 7, -(-length * (i + 1) // 7)) for i in range(7)]
        maps = torch.stack([maps.narrow(dim, start, end - start).mean(dim) for start, end in bins], dim)
    return maps


def _initialize(layer: nn.Module) -> None:
    """As the reference (ModelZoo's VGG16, after torchvision's vgg.py): Kaiming fan-out, linear layers N(0, 0.01)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def to_torchvision_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict under torchvision's names.

    Accepts torchvision's own names, the reference's (`fc1 fc2 fc3` for `classifier.0 .3 .6`), and either with the
    `module.` that DistributedDataParallel puts in front.
    """
    layers = {"fc1": "classifier.0", "fc2": "classifier.3", "fc3": "classifier.6"}

    def torchvision_name(name: str) -> str:
        head, _, tail = re.sub(r"^(module\.)+", "", name).partition(".")
        return f"{layers.get(head, head)}.{tail}"

    return OrderedDict((torchvision_name(name), tensor) for name, tensor in state_dict.items())


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return the architecture of a state dict under torchvision's names, None if it is not a VGG's."""
    convolutions = sum(tensor.dim() == 4 for tensor in state_dict.values())
    batch_norm = any(name.endswith("running_mean") for name in state_dict)
    for name, depths in DEPTHS.items():
        if sum(depths) == convolutions:
            return f"{name}_bn" if batch_norm else name
    return None


def network_of(state_dict: dict[str, torch.Tensor]) -> VGG | None:
    """Return a VGG of the shape of a state dict under torchvision's names, not loaded; None if it is not a VGG's."""
    arch, last = architecture_of(state_dict), f"{LAST_LAYER}.weight"
    if arch is None or not {last, "classifier.0.weight"} <= state_dict.keys():
        return None
    layers = {int(name.split(".")[1]): len(tensor) for name, tensor in state_dict.items() if tensor.dim() == 4}
    channels = [layers[number] for number in sorted(layers)]
    ends = accumulate(DEPTHS[arch.replace("_bn", "")])
    return VGG(arch, len(state_dict[last]), [channels[end - 1] for end in ends], len(state_dict["classifier.0.weight"]))


def describe_mismatch(state_dict: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    """Name the first parameter by which a state dict does not fit the model; None if it fits."""
    expected = model.state_dict()
    for name in [*expected, *state_dict]:
        if name not in state_dict:
            # Weights older than torch 0.4.1 lack batch norm's counter, which a fixed momentum does not use.
            if name.endswith("num_batches_tracked"):
                continue
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not exist in this architecture"
        if state_dict[name].shape != expected[name].shape:
            return f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(state_dict[name].shape)}"
    return None
