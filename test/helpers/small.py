# SPDX-License-Identifier: BSD-3-Clause
"""main.py with a VGG of few channels, whose checkpoints have 0.4 MB instead of 1 GB: to test everything around it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # layers this small only wait for a second thread
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from engine.console import run_script

import main
import vgg

WIDTHS, HIDDEN = (8, 8, 16, 16, 16), 32


def small_vgg(arch: str, num_classes: int, head: str = "paper") -> vgg.VGG:
    return vgg.VGG(arch, num_classes, WIDTHS, HIDDEN, head)


def run(argv: list[str] | None = None) -> NoReturn:
    """Run main.py as the script does, and end the process."""
    sys.argv[0] = "main.py"  # the name in front of errors
    run_script(lambda: main.main(argv, small_vgg))


if __name__ == "__main__":
    run()
