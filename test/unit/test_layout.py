# SPDX-License-Identifier: BSD-3-Clause
"""Where the images of a dataset are, and which folder was meant."""

import errno
import os
import unicodedata

from engine.data.datasets import check_same_classes, open_datasets
from engine.errors import DataError, UsageError

import numpy as np
import pytest
from PIL import Image


def write_classes(root, counts):
    for name, count in counts.items():
        os.makedirs(os.path.join(str(root), name), exist_ok=True)
        for number in range(count):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(os.path.join(str(root), name, f"{number}.png"))


# --- where the classes are --------------------------------------------------------------------------------------------


def open_both(root, **options):
    return open_datasets(str(root), evaluate=False, skip_unreadable=False, **options)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "VALID", "Validation"])
@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
def test_the_parts_of_a_dataset_are_known_by_any_of_their_names(tmp_path, train, val):
    write_classes(tmp_path / train, {"a": 3, "b": 3})
    write_classes(tmp_path / val, {"a": 1, "b": 1})
    for test in ("test", "Testing"):
        write_classes(tmp_path / test, {"c": 1})
    training, validation = open_both(tmp_path)
    assert (len(training), len(validation)) == (6, 2)
    assert open_datasets(str(tmp_path), evaluate=True, skip_unreadable=False)[0] is None
    with pytest.raises(UsageError, match="is split already"):
        open_both(tmp_path, val_split=0.2)
    (tmp_path / val / "b").rename(tmp_path / val / "c")
    with pytest.raises(UsageError, match=f"'b' in {train}/ and 'c' in {val}/"):
        open_both(tmp_path)


def test_of_two_names_the_usual_one_is_used(tmp_path):
    for number, name in enumerate(["val", "Val", "valid", "validation"], 1):
        write_classes(tmp_path / name, {"a": number, "b": number})
    for name in ("Train", "train"):
        write_classes(tmp_path / name, {"a": 1 + (name == "train"), "b": 1})
    training, validation = open_both(tmp_path)
    assert (len(training), len(validation)) == (3, 2)


PARTS = [("train", "val"), ("Train", "Test"), ("training", "validation"), ("train", "valid", "test"), ("train",)]


@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_a_folder_one_level_too_high_is_refused_and_the_right_one_named(tmp_path, parts, beside, share):
    for part in parts:
        write_classes(tmp_path / "photos" / part, {"a": 2, "b": 2})
    if beside:
        write_classes(tmp_path, {"docs": 2})
    if beside and len(parts) == 1:
        return  # a class may have a folder of trains
    for evaluate in (False, True):
        with pytest.raises(DataError) as refusal:
            open_datasets(str(tmp_path), evaluate=evaluate, skip_unreadable=False, val_split=share)
        assert f"use {tmp_path / 'photos'}" in str(refusal.value) and "--val-split" not in str(refusal.value)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("share", [None, 0.2])
def test_a_folder_several_levels_too_high_leads_to_the_right_one(tmp_path, depth, share):
    inner = tmp_path.joinpath(*["in"] * depth)
    write_classes(inner / "train", {"a": 2, "b": 2})
    write_classes(inner / "val", {"a": 2, "b": 2})
    root = tmp_path
    for _ in range(depth):
        with pytest.raises(DataError, match="in") as refusal:
            open_both(root, val_split=share)
        assert "--val-split" not in str(refusal.value)
        root = root / "in"
        if share or depth == 1:
            assert f"use {root}" in str(refusal.value)
    assert len(open_both(root)[0]) == 4


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("share", [None, 0.2])
@pytest.mark.parametrize("locked", ["val", "val/train", "val/test", ""])
def test_a_folder_that_cannot_be_read_is_named_if_it_is_needed(tmp_path, monkeypatch, locked, share, evaluate, code):
    for name in ("train", "in/train", "in/val"):
        write_classes(tmp_path / "val" / name, {"a": 2, "b": 2})
    os.rename(str(tmp_path / "val" / "train"), str(tmp_path / "val" / "test"))
    scandir = os.scandir

    def refuse(path):
        if os.path.realpath(os.fsdecode(path)) == os.path.realpath(str(tmp_path / locked)):
            raise OSError(code, os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as refusal:
        open_datasets(str(tmp_path / "val"), evaluate=evaluate, skip_unreadable=False, val_split=share)
    text = str(refusal.value)
    if locked == "val" or (locked == "val/test" and share):
        assert text == f"{tmp_path / locked}: {os.strerror(code)}"
    elif evaluate and share is None:
        assert text.endswith(f"to evaluate {tmp_path / 'val/test'}, use --data {tmp_path / 'val/test'}")
    else:
        assert "but in in/: use" in text or "in it; use" in text


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_folder_one_level_too_low_is_refused_and_the_right_one_named(tmp_path, part):
    for name in ("train", "val", "test"):
        write_classes(tmp_path / "data" / name, {"a": 2, "b": 2})
    with pytest.raises(DataError) as refusal:
        open_both(tmp_path / "data" / part)
    assert f"use {tmp_path / 'data'}" in str(refusal.value) and "--val-split" not in str(refusal.value)


@pytest.mark.parametrize("folders", [[], ["cat", "dog"]])
@pytest.mark.parametrize("split", [False, True])
def test_a_single_class_is_refused_with_the_folders_in_it(tmp_path, folders, split):
    for part in ("train", "val") if split else ("",):
        write_classes(tmp_path / part, {"photos": 2, **{f"photos/{name}": 2 for name in folders}})
    with pytest.raises(DataError, match="at least two.*photos" + ".*".join(["", *folders])) as refusal:
        open_both(tmp_path, val_split=None if split else 0.3)
    assert not folders or f"use {tmp_path / ('train' if split else '') / 'photos'}" in str(refusal.value)


@pytest.mark.parametrize(
    "names", [["train"], ["Train", "Test"], ["test"], ["val"], ["validation", "test"]], ids="-".join
)
def test_a_part_that_is_missing_is_named(tmp_path, names):
    for name in names:
        write_classes(tmp_path / name, {"a": 2, "b": 2})
    with pytest.raises(DataError, match="no (train|val)/") as refusal:
        open_both(tmp_path)
    if names[0].lower() == "train":
        assert f"--data {tmp_path / names[0]} --val-split" in str(refusal.value)
        assert len(open_both(tmp_path / names[0], val_split=0.5)[0]) > 0  # as it says
    else:
        assert "--val-split" not in str(refusal.value)


@pytest.mark.parametrize("train, val", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_classes_may_be_spelled_as_on_another_system(tmp_path, train, val):
    names = ["e", "é", "f", "ü", "z", "한국"]
    for part, form in (("train", train), ("val", val)):
        write_classes(tmp_path / part, {unicodedata.normalize(form, name): 1 for name in names})
    training, validation = open_both(tmp_path)
    assert training.classes == validation.classes == sorted(names)
    for dataset in (training, validation):
        folders = [os.path.basename(os.path.dirname(dataset.name(i))) for i in range(6)]
        assert [unicodedata.normalize("NFC", folder) for folder in folders] == [
            dataset.classes[i] for i in dataset.labels
        ]
    check_same_classes([unicodedata.normalize("NFD", name) for name in sorted(names)], training.classes, "a", "b")
