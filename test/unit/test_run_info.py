# SPDX-License-Identifier: BSD-3-Clause
"""What a run says of its classes and of the program."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace
from typing import Any

from engine.errors import UsageError
from engine.records import run_info
from engine.records.run_info import describe_balance, program_checksum, versions, write_text

from helpers.program import REPOSITORY

import numpy as np
import pytest
import torch


def test_the_smallest_and_the_largest_class_are_named() -> None:
    assert describe_balance(["cat", "dog"], np.array([0, 1, 1, 0])) == "2 classes of 2 training images each"
    unequal = describe_balance(["cat", "d\udcffg", "emu"], np.array([0, 1, 1, 2, 1, 0]))
    assert "3 classes" in unequal and "emu, has 1 " in unequal and r"d\xffg, 3" in unequal
    assert "--class-weights" not in unequal


def test_unbalanced_classes_are_told_of_class_weights() -> None:
    labels = np.repeat([0, 1], [1, 6])
    assert "6; --class-weights auto" in describe_balance(["cat", "dog"], labels)
    assert describe_balance(["cat", "dog"], labels, [3.5, 0.5833]).endswith("6; --class-weights: 3.5 and 0.583")


def test_versions_name_the_torch_and_the_hardware() -> None:
    found = versions("a card")
    assert list(found) == ["torch", "python", "hardware", "commit"]
    assert found["torch"] == torch.__version__ and found["hardware"] == "a card"


@pytest.mark.parametrize("changed", ["main.py", "engine/errors.py", "engine/records/metrics.py"])
def test_the_checksum_covers_the_files_of_every_package(tmp_path: Any, monkeypatch: Any, changed: str) -> None:
    shutil.copytree(os.path.join(REPOSITORY, "engine"), str(tmp_path / "engine"))
    shutil.copy(os.path.join(REPOSITORY, "main.py"), str(tmp_path))
    monkeypatch.setattr(run_info, "ROOT", str(tmp_path))
    before = program_checksum()
    with open(str(tmp_path / changed), "a") as file:
        file.write("# changed\n")
    assert len(before) == 12 and program_checksum() != before


def test_a_text_keeps_the_bytes_of_a_path_and_an_error_names_the_file(tmp_path: Any) -> None:
    write_text(str(tmp_path / "a"), "图 \udcff\n")
    assert (tmp_path / "a").read_bytes() == "图 ".encode() + b"\xff\n"
    with pytest.raises(UsageError, match="missing/a: No such file"):
        write_text(str(tmp_path / "missing" / "a"), "")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "train, val, after",
    [(1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 0), (None, 1, 1), (None, 0, "before"), (None, None, "before")],
)
def test_the_list_of_unreadable_images_is_that_of_this_run(
    tmp_path: Any, before: bool, train: Any, val: Any, after: Any
) -> None:
    """An evaluation (train: None) or synthetic images know nothing of the training images that are listed."""
    path = tmp_path / "bad_images.txt"
    if before:
        path.write_text("old")
    datasets = [
        None if count is None else SimpleNamespace(unreadable=[("x.jpg", "cut")] * count) for count in (train, val)
    ]
    run_info.write_bad_images(str(tmp_path), *datasets)
    found = path.read_text() if path.exists() else ""
    assert found == (["", "x.jpg\tcut\n"][after] if after != "before" else "old" * before)
