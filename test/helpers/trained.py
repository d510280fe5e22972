# SPDX-License-Identifier: BSD-3-Clause
"""A run from pretrained weights with small.py's vgg11_bn, and the scripts that use its checkpoint."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.file import load

from helpers.program import Result, run_main

import numpy as np
import torch
from torch import nn
from torchvision.models.vgg import make_layers

FLAGS = ["--arch", "vgg11_bn", "--image-size", "32", "-b", "6"]
PRETRAINED = "pretrained.pth"  # of five classes
CLASSES = ["tench", "goldfish", '"great white" shark', "hammerhead", "图"]


class TorchvisionVGG(nn.Module):
    """small.py's vgg11_bn, its layers and pooling as torchvision has them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = make_layers([8, "M", 8, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        widths = [(16 * 7 * 7, 32), (32, 32), (32, classes)]
        layers = [[nn.Linear(*width), nn.ReLU(), nn.Dropout()] for width in widths]
        self.classifier = nn.Sequential(*[layer for group in layers for layer in group][:-2])
        for layer in self.modules():  # by default the activations would vanish, and all images look alike
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def train_classifier(folder: str, root: Any) -> Result:
    """Train the classifier of ROOT/pretrained.pth for two epochs, with an EMA, into ROOT/model_best.pth.tar.

    ROOT/names.txt gets the names of the five classes.
    """
    torch.manual_seed(0)
    torch.save(TorchvisionVGG(len(CLASSES)).state_dict(), str(root / PRETRAINED))
    result = run_main(
        *[folder, *FLAGS, "--pretrained", root / PRETRAINED, "--freeze-features", "--ema-decay", "0.9"],
        *["--epochs", 2, "--lr", 0.02, "--output-dir", root],
    )
    assert result.code == 0, result.err
    (root / "names.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return result


def expected_predictions(checkpoint_path: Any, image: np.ndarray) -> list[tuple[str, float]]:
    """(class, probability) of an image, most probable first, by torchvision with the EMA weights of a checkpoint.

    image: (S, S, 3) uint8.
    """
    checkpoint = load(str(checkpoint_path))
    network = TorchvisionVGG(len(checkpoint["classes"])).eval()
    network.load_state_dict(checkpoint["state_dict_ema"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(image.copy()).float() / 255 - mean) / std).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        probabilities, order = network(pixels).softmax(1)[0].sort(descending=True)
    return [(checkpoint["classes"][i], value) for i, value in zip(order.tolist(), probabilities.tolist())]
