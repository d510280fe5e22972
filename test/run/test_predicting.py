# SPDX-License-Identifier: BSD-3-Clause
"""predict.py on the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from engine.checkpoints.file import load
from engine.data import Preprocessing, open_datasets
from engine.errors import UsageError

import predict
from helpers.program import REPOSITORY, RUN_SCRIPT, Result, environment, run, run_script
from helpers.trained import CLASSES, PRETRAINED, expected_predictions, train_classifier

import numpy as np
import pytest
import torch
from PIL import Image

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def root(folder: str, tmp_path_factory: Any) -> Any:
    """A folder with model_best.pth.tar of three classes, pretrained.pth of five, and images."""
    root = tmp_path_factory.mktemp("predicted")
    train_classifier(folder, root)
    shutil.copytree(os.path.join(folder, "val", "class 1"), str(root / "holiday"))
    (root / "holiday" / "corrupt.png").write_bytes(b"not an image")
    (root / "holiday" / "notes.txt").write_bytes(b"not an image, and not taken for one")
    return root


@pytest.fixture(scope="module")
def holiday(root: Any) -> Result:
    """The predictions of the pretrained weights for a folder, as CSV."""
    flags = ["--checkpoint", PRETRAINED, "--classes", "names.txt", "--csv", *CPU]
    return run_script("predict.py", "holiday", *flags, cwd=str(root))


def validation_image(folder: str) -> tuple[str, Any]:
    """(path, pixels as for validation at 32 pixels) of the first image of class 1."""
    _, dataset = open_datasets(folder, evaluate=True, skip_unreadable=False)
    assert dataset is not None and dataset.labels[5] == 1
    return dataset.name(5), Preprocessing(32)(dataset.read(5))


def test_predictions_are_those_of_validation_with_the_ema_weights(root: Any, folder: str) -> None:
    path, image = validation_image(folder)
    result = run_script("predict.py", path, "--checkpoint", root / "model_best.pth.tar", *CPU)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == path
    expected = expected_predictions(root / "model_best.pth.tar", image)
    assert len(lines) == 1 + len(expected) == 4
    for rank, (line, (name, probability)) in enumerate(zip(lines[1:], expected), 1):
        match = re.fullmatch(r"  (\d)  ([ \d]{3}\.\d\d)%  (.*)", line)
        assert match is not None, line
        assert (int(match[1]), match[3]) == (rank, name)
        assert float(match[2]) == pytest.approx(100 * probability, abs=0.01)


def test_a_corrupt_image_is_one_error_and_the_others_are_predicted(holiday: Result) -> None:
    assert holiday.code == 2
    assert holiday.err.startswith("predict.py: error: holiday/corrupt.png: cannot be read as an image")
    assert len(holiday.err.splitlines()) == 1
    rows = list(csv.reader(holiday.out.splitlines()))
    assert rows[0] == ["image", "rank", "class", "probability"]
    assert [row[0] for row in rows[1::5]] == [f"holiday/图 00{number}.JPEG" for number in range(5)]
    assert len(rows) == 1 + 5 * 5


def test_images_of_which_pillow_warns_are_predicted_without_a_word(root: Any, tmp_path: Any) -> None:
    os.mkdir(str(tmp_path / "odd"))
    image = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))
    for opaque in range(3):
        transparency = bytes([0, 128, 255][opaque:]) + bytes(100)
        image.convert("P").save(str(tmp_path / "odd" / f"palette {opaque}.png"), transparency=transparency)
    exif = b"Exif\0\0II*\0\x08\0\0\0"  # a table whose entries are cut off, or lie outside of the file
    entry = b"\x0e\x01\x02\0\xff\xff\0\0\xff\xff\0\0"
    for length in range(0, len(entry) + 1, 3):
        path = str(tmp_path / "odd" / f"exif {length}.jpg")
        image.save(path, exif=exif + b"\x03\0" + entry[:length])
    content = load(str(root / "model_best.pth.tar"))
    content["preprocessing"]["exif_rotate"] = True
    torch.save(content, str(tmp_path / "rotates.pth"))
    for checkpoint in (root / "model_best.pth.tar", tmp_path / "rotates.pth"):
        result = run_script("predict.py", tmp_path / "odd", "--checkpoint", checkpoint, "--csv", *CPU)
        assert (result.code, result.err) == (0, ""), result.err
        assert len(result.out.splitlines()) == 1 + 3 * len(os.listdir(str(tmp_path / "odd")))


def test_weights_of_torchvision_predict_with_a_file_of_class_names(holiday: Result) -> None:
    rows = list(csv.reader(holiday.out.splitlines()))[1:6]
    assert [row[1] for row in rows] == list("12345")
    assert {row[2] for row in rows} == set(CLASSES)
    probabilities = [float(row[3]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)


def test_weights_without_class_names_predict_numbers(root: Any, folder: str) -> None:
    path, _ = validation_image(folder)
    result = run_script("predict.py", path, "--checkpoint", root / PRETRAINED, "--json", *CPU)
    assert result.code == 0, result.err
    assert {item["class"] for item in json.loads(result.out)["predictions"]} == set("01234")


def test_any_number_of_predictions_in_batches_of_any_size(root: Any, folder: str) -> None:
    """With more than one batch, DataLoader workers read the images."""
    flags = [os.path.join(folder, "val"), "--checkpoint", root / "model_best.pth.tar", "--csv", *CPU]
    tables = []
    for batch_size in (2, 64):
        result = run_script("predict.py", *flags, "--top-k", 2, "--batch-size", batch_size)
        assert result.code == 0, result.err
        tables.append([row.rsplit(",", 1) for row in result.out.splitlines()[1:]])
    assert len(tables[0]) == 15 * 2
    for first, second in zip(*tables):
        assert first[0] == second[0] and float(first[1]) == pytest.approx(float(second[1]), abs=1e-5)


def test_predictions_that_nobody_reads_end_quietly_and_lost_ones_are_an_error(root: Any) -> None:
    words = [os.path.join(REPOSITORY, "predict.py"), "holiday", "--checkpoint", "model_best.pth.tar", "--csv", *CPU]
    command = [sys.executable, "-c", RUN_SCRIPT, *words]
    cwd = str(root)
    result = run("bash", "-c", '"$@" | head -n 1', "bash", *command, "-b", 1, cwd=cwd)
    assert result.out == "image,rank,class,probability\n" and "warning" not in result.err, result.err
    result = run("bash", "-c", '"$@" > /dev/full', "bash", *command, cwd=cwd)
    assert result.code == 2 and "cannot be printed (No space left on device)" in result.err, result.err


def test_a_heatmap_has_a_row_for_each_image(root: Any, folder: str, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    path, _ = validation_image(folder)
    sizes = []
    for paths in ([path], [path, path]):
        flags = ["--checkpoint", root / "model_best.pth.tar", "--heatmap", tmp_path / "map.png", *CPU]
        result = run_script("predict.py", *paths, *flags)
        assert result.code == 0, result.err
        sizes.append(Image.open(str(tmp_path / "map.png")).size)
    assert sizes[0][0] == sizes[1][0] > 500
    assert sizes[1][1] == pytest.approx(2 * sizes[0][1], abs=2)


@pytest.mark.parametrize("number, left", [(signal.SIGINT, []), (signal.SIGTERM, ["x.npy.part", "x.txt.part"])])
def test_features_that_are_interrupted_are_no_file(
    root: Any, folder: str, tmp_path: Any, number: int, left: list[str]
) -> None:
    path, _ = validation_image(folder)
    words = [os.path.join(REPOSITORY, "predict.py"), *[path] * 10000, "--checkpoint", str(root / "model_best.pth.tar")]
    words += ["--features", "relu1_1", "--pool", "none", "--output", str(tmp_path / "x.npy"), "-b", "4", *CPU]
    process = subprocess.Popen([sys.executable, "-c", RUN_SCRIPT, *words], stderr=subprocess.PIPE, env=environment())
    part = str(tmp_path / "x.npy.part")
    while process.poll() is None and not (os.path.exists(part) and os.path.getsize(part) > 1 << 20):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert sorted(os.listdir(str(tmp_path))) == left


def test_features_are_the_same_in_batches_of_any_size(root: Any, folder: str, tmp_path: Any) -> None:
    """With more than one batch, DataLoader workers read the images. A file of before is replaced."""
    flags = [os.path.join(folder, "val"), "--checkpoint", root / "model_best.pth.tar", "--features", "fc7", *CPU]
    features = []
    for batch_size in (2, 64):
        result = run_script("predict.py", *flags, "--output", tmp_path / "x.npy", "--batch-size", batch_size)
        assert result.code == 0 and result.out == "", result.err
        assert result.err == f"=> features written to {tmp_path}/x.npy: 15 rows of 32; names in {tmp_path}/x.txt\n"
        features.append(np.load(str(tmp_path / "x.npy")))
    assert features[0].shape == (15, 32) and np.allclose(*features, rtol=0, atol=1e-5)
    names = (tmp_path / "x.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(names) and len(set(names)) == 15 and all(os.path.exists(name) for name in names)


def test_wrong_use_is_one_line_and_exit_code_2(root: Any, folder: str, tmp_path: Any, capsys: Any) -> None:
    path, _ = validation_image(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    torch.save({"fc.weight": torch.zeros(2, 2)}, str(tmp_path / "other.pth"))
    best = str(root / "model_best.pth.tar")
    for words, message in (
        ([str(tmp_path / "empty"), "--checkpoint", best], "no images in it"),
        ([path, "--checkpoint", str(tmp_path / "other.pth")], "holds weights, but not those of a VGG"),
        ([path, "--checkpoint", best, "--classes", "/no/such/file"], "--classes /no/such/file: No such file"),
        ([path, "--checkpoint", best, "--classes", str(tmp_path / "latin1")], "expected UTF-8 text"),
        ([*[path] * 25, "--checkpoint", best, "--heatmap", "map.png"], "at most 24 images, got 25"),
        ([path, "--checkpoint", best, "--heatmap", "map.xyz"], "must end in .png|requires matplotlib"),
        ([path, "--checkpoint", best, "--heatmap", "/proc/map.png"], "cannot write there|requires matplotlib"),
    ):
        with pytest.raises(UsageError, match=message) as refusal:
            predict.main([*words, *CPU])
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(SystemExit) as leaving:
        predict.main([path, "--checkpoint", best, "--json", "--csv"])
    assert leaving.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
