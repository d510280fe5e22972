# SPDX-License-Identifier: BSD-3-Clause
"""The version of torch as numbers."""

from __future__ import annotations

from engine.versions import TORCH

import torch


def test_the_version_is_major_and_minor() -> None:
    assert len(TORCH) == 2 and torch.__version__.startswith("{}.{}.".format(*TORCH))
