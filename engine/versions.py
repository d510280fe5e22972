# SPDX-License-Identifier: BSD-3-Clause
"""The version of torch as numbers, to be compared: as strings, "1.11" would be less than "1.8"."""

import re

import torch

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
