# SPDX-License-Identifier: BSD-3-Clause
"""--eval-view, --eval-scales and --predictions, on one process and on two."""

from __future__ import annotations

import csv
import os
from typing import Any

from helpers.program import TWO, run_main

import pytest

SMALL = ["--arch", "vgg11", "--image-size", "32", "-b", "4"]


@pytest.fixture(scope="module")
def checkpoint(folder37: str, tmp_path_factory: Any) -> Any:
    output = tmp_path_factory.mktemp("trained")
    result = run_main(folder37, *SMALL, "--epochs", 3, "--output-dir", output)
    assert result.code == 0, result.err
    return output / "checkpoint.pth.tar"


def predictions(path: Any) -> list[list[str]]:
    with open(str(path), newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("view", ["ten-crop", "dense"])
def test_each_image_is_counted_once_on_any_number_of_processes(
    folder37: str, checkpoint: Any, tmp_path: Any, view: str
) -> None:
    flags = [folder37, *SMALL, "-e", "--resume", checkpoint, "--eval-view", view, "--eval-scales", 36, 48]
    tables = []
    for number, processes in enumerate([["-j", 0], [*TWO, "-j", 2, "-b", 6]]):
        path = tmp_path / f"{number} 图.csv"
        result = run_main(*flags, "--predictions", path, "--output-dir", tmp_path, *processes)
        assert result.code == 0, result.err
        tables.append(predictions(path))
    header = ["path", "target", "prediction", "probability", "prediction2", "probability2"]
    assert tables[0][0] == tables[1][0] == header
    assert len(tables[0]) == len(tables[1]) == 1 + 37
    assert len({row[0] for row in tables[0][1:]}) == 37 and all(os.path.isfile(row[0]) for row in tables[0][1:])
    for first, second in zip(tables[0][1:], tables[1][1:]):
        assert first[:2] == second[:2]
        assert float(first[3]) == pytest.approx(float(second[3]), abs=2e-5)
    correct = sum(row[1] == row[2] for row in tables[1][1:])
    assert result.accuracy()[0] == f"{100 * correct / 37:.3f}"


def test_a_crop_larger_than_a_scale_is_refused(folder37: str, checkpoint: Any, tmp_path: Any) -> None:
    flags = [folder37, *SMALL, "-e", "--resume", checkpoint, "--output-dir", tmp_path, "--eval-view", "dense"]
    result = run_main(*flags, "--image-size", 64, "--eval-scales", 96, 48)
    assert result.code == 2 and "--eval-scales must be at least the crop, --image-size 64, got 48" in result.err
