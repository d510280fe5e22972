# SPDX-License-Identifier: BSD-3-Clause
"""The version of torch as numbers, and the NumPy that belongs to it."""

from __future__ import annotations

from typing import Any

from engine.errors import UsageError
from engine.versions import TORCH, check_numpy

import export
import main
import predict

import pytest
import torch


def test_the_version_is_major_and_minor() -> None:
    assert len(TORCH) == 2 and torch.__version__.startswith("{}.{}.".format(*TORCH))


@pytest.mark.parametrize(
    "script, words",
    [
        (main, ["--device", "cpu"]),
        (main, []),
        (predict, ["x.jpg", "--checkpoint", "x.pth.tar"]),
        (export, ["--checkpoint", "x.pth.tar"]),
    ],
)
def test_a_torch_that_cannot_use_numpy_2_is_refused_in_one_line(
    monkeypatch: Any, script: Any, words: list[str]
) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("Numpy is not available")  # as torch 2.1.2 with NumPy 2.2.6

    check_numpy()
    monkeypatch.setattr(torch, "from_numpy", refuse)
    with pytest.raises(UsageError, match=r"^torch .* does not work with NumPy .*: pip install 'numpy<2'$"):
        script.main(words)
