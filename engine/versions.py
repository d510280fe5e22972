# SPDX-License-Identifier: BSD-3-Clause
"""The version of torch as numbers, to be compared: as strings, "1.11" would be less than "1.8"."""

import importlib.util
import re

from engine.errors import UsageError

import torch

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def require_torchvision(flag: str) -> None:
    """Raise UsageError if the transforms of a flag are not there."""
    if TORCH < (2, 1):
        raise UsageError(f"{flag} requires torch 2.1 or later, this is {torch.__version__}: leave it out")
    if importlib.util.find_spec("torchvision") is None:
        raise UsageError(f"{flag} requires torchvision: pip install torchvision")
