# SPDX-License-Identifier: BSD-3-Clause
"""main.py with a VGG of few channels, whose checkpoints have 0.4 MB instead of 1 GB: to test everything around it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import main
import vgg
from engine import accelerator
from engine.errors import run_script

from torch import nn

vgg.WIDTHS = (8, 8, 16, 16, 16)
accelerator.available_cores = lambda: 1  # layers this small only wait for a second thread


class SmallVGG(vgg.VGG):
    """The same layers under the same names, with dropout, whose masks a resumed run must draw again."""

    def __init__(self, arch: str = "vgg16", num_classes: int = 1000) -> None:
        nn.Module.__init__(self)
        self.features = vgg._features(vgg.DEPTHS[arch.replace("_bn", "")], batch_norm=arch.endswith("_bn"))
        self.classifier = nn.Sequential(
            nn.Linear(16 * 7 * 7, 32),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(32, 32),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(32, num_classes),
        )
        self.apply(vgg._initialize)


vgg.VGG = SmallVGG  # at import: spawned processes import this file again


def run(argv: list[str] | None = None) -> NoReturn:
    """Run main.py as the script does, and end the process."""
    sys.argv[0] = "main.py"  # the name in front of errors
    run_script(lambda: main.main(argv))


if __name__ == "__main__":
    run()
