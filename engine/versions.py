# SPDX-License-Identifier: BSD-3-Clause
"""The version of torch as numbers, to be compared: as strings, "1.11" would be less than "1.8"."""

import re

from engine.errors import UsageError

import numpy as np
import torch

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def check_numpy() -> None:
    """Raise UsageError if torch cannot use the NumPy that is installed, as torch before 2.3 cannot use NumPy 2."""
    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:
        raise UsageError(
            f"torch {torch.__version__} does not work with NumPy {np.__version__} ({error}): pip install 'numpy<2'"
        ) from error
