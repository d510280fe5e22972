# SPDX-License-Identifier: BSD-3-Clause
"""main.py with a VGG of few channels, whose checkpoints have 0.4 MB instead of 1 GB: to test everything around it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import main
import vgg
from engine.device import compute as accelerator
from engine.errors import run_script

vgg.WIDTHS, vgg.HIDDEN = (8, 8, 16, 16, 16), 32  # at import: spawned processes import this file again
accelerator.available_cores = lambda: 1  # layers this small only wait for a second thread


def run(argv: list[str] | None = None) -> NoReturn:
    """Run main.py as the script does, and end the process."""
    sys.argv[0] = "main.py"  # the name in front of errors
    run_script(lambda: main.main(argv))


if __name__ == "__main__":
    run()
