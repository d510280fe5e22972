# SPDX-License-Identifier: BSD-3-Clause
"""CIFAR-10 and CIFAR-100, in both formats of their archives, the folder itself and as unpacked."""

from __future__ import annotations

import os
import pickle

from engine.data import open_datasets
from engine.data.cifar import CIFAR10, CIFAR100, read_cifar
from engine.errors import DataError

from helpers.images import write_cifar

import numpy as np
import pytest

DATASETS = {"CIFAR-10": CIFAR10, "CIFAR-100": CIFAR100}
every = pytest.mark.parametrize("title, binary", [(title, binary) for title in DATASETS for binary in (False, True)])


def write(root, title, binary):
    return write_cifar(root, binary, classes=DATASETS[title].class_count)


def read(root, evaluate=False):
    return open_datasets(str(root), evaluate=evaluate, skip_unreadable=False)


@every
@pytest.mark.parametrize("inside", [False, True], ids=["the folder itself", "as unpacked"])
def test_cifar_is_read_in_both_of_its_formats(tmp_path, title, binary, inside):
    cifar = DATASETS[title]
    expected = write(tmp_path / cifar.folders[binary] if inside else tmp_path, title, binary)
    training, validation = read(tmp_path)
    assert len(training) == 40 * len(cifar.train) and len(validation) == 40
    for number, name in enumerate(cifar.train):
        pixels, labels = expected[name]
        part = slice(40 * number, 40 * number + 40)
        assert np.array_equal(training.images[part].transpose(0, 3, 1, 2).reshape(40, -1), pixels)
        assert list(training.labels[part]) == labels
    assert list(validation.labels) == expected[cifar.test][1]
    assert len(training.classes) == cifar.class_count and training.preprocessing == cifar.preprocessing
    assert training.classes[9] == ("truck" if title == "CIFAR-10" else "class_9")
    none, same = read(tmp_path, evaluate=True)
    assert none is None and same.fingerprint == validation.fingerprint


def test_both_in_one_folder_are_told_apart(tmp_path):
    for title, cifar in DATASETS.items():
        write(tmp_path / cifar.folders[False], title, False)
    with pytest.raises(DataError, match="CIFAR-10 and CIFAR-100.*cifar-100-python.*cifar-10-batches-py"):
        read(tmp_path)
    for title, cifar in DATASETS.items():
        assert len(read(tmp_path / cifar.folders[False])[1].classes) == DATASETS[title].class_count


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_is_read(tmp_path, protocol, order):
    write(tmp_path, "CIFAR-10", False)
    expected = read(tmp_path, evaluate=True)[1]
    with open(str(tmp_path / "test_batch"), "rb") as file:
        record = pickle.load(file, encoding="bytes")
    record[b"data"] = np.array(record[b"data"], order=order)
    with open(str(tmp_path / "test_batch"), "wb") as file:
        pickle.dump(record, file, protocol=protocol)
    assert read(tmp_path, evaluate=True)[1].fingerprint == expected.fingerprint


@pytest.mark.parametrize("change", [lambda label: [label], lambda label: label + 0.7, lambda label: None, bool])
def test_labels_that_are_not_one_integer_per_image_are_refused(tmp_path, change):
    write(tmp_path, "CIFAR-10", False)
    with open(str(tmp_path / "test_batch"), "rb") as file:
        record = pickle.load(file, encoding="bytes")
    record[b"labels"] = [change(label) for label in record[b"labels"]]
    with open(str(tmp_path / "test_batch"), "wb") as file:
        pickle.dump(record, file, protocol=2)
    with pytest.raises(DataError, match="test_batch: not a CIFAR-10 file .labels .40,.* expected integers"):
        read(tmp_path, evaluate=True)


def test_a_pickle_that_carries_code_is_refused_and_runs_nothing(tmp_path):
    write(tmp_path, "CIFAR-10", False)
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    with open(str(tmp_path / "test_batch"), "wb") as file:
        pickle.dump({b"labels": [1], b"data": Hostile()}, file, protocol=2)
    with pytest.raises(DataError, match="test_batch.*mkdir"):
        read(tmp_path, evaluate=True)
    assert not canary.exists()


@every
def test_a_file_that_is_truncated_missing_or_of_the_other_dataset_is_named(tmp_path, title, binary):
    cifar, other = DATASETS[title], "CIFAR-100" if title == "CIFAR-10" else "CIFAR-10"
    write(tmp_path / "data", title, binary)
    write(tmp_path / "other", other, binary)
    suffix = ".bin" if binary else ""
    path = tmp_path / "data" / (cifar.train[-1] + suffix)
    content = path.read_bytes()
    wrong = (tmp_path / "other" / (DATASETS[other].train[-1] + suffix)).read_bytes()
    for changed in (content[:-100], content[: len(content) // 2 + 1], b"", wrong):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=f"{path.name}: not a {title} file"):
            read(tmp_path / "data")
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}.*No such file"):
        read(tmp_path / "data")
    assert len(read(tmp_path / "data", evaluate=True)[1]) == 40


@pytest.mark.parametrize("binary", [False, True])
def test_names_that_are_not_a_hundred_are_refused(tmp_path, binary):
    write(tmp_path, "CIFAR-100", binary)
    names = tmp_path / ("fine_label_names.txt" if binary else "meta")
    for content in (b"", b"a\nb\n", pickle.dumps({b"fine_label_names": [b"a"] * 99}, protocol=2)):
        names.write_bytes(content)
        with pytest.raises(DataError, match=f"{names.name}: not a CIFAR-100 file"):
            read(tmp_path)


@pytest.mark.parametrize("title, training", [("CIFAR-10", True), ("CIFAR-10", False), ("CIFAR-100", False)])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_cut_off_between_two_images_is_named(tmp_path, capsys, title, training, lost):
    cifar = DATASETS[title]
    write_cifar(tmp_path, True, count=1, classes=cifar.class_count)
    for name in cifar.train if training else [cifar.test]:
        os.truncate(str(tmp_path / f"{name}.bin"), 10_000 * (3072 + cifar.label_bytes))  # of zeros, not on the disk
    name = f"{cifar.train[3] if training else cifar.test}.bin"
    os.truncate(str(tmp_path / name), (10_000 - lost) * (3072 + cifar.label_bytes))
    images, labels, _ = read_cifar(cifar, str(tmp_path), True, training=training)
    assert len(images) == len(labels) == (50_000 if training else 10_000) - lost
    warning = f"=> warning: {tmp_path}: {name} has {10_000 - lost:,} images; as published, 10,000 each\n"
    assert capsys.readouterr().out == (warning if lost else "")


@every
def test_a_reduced_set_is_named_in_one_line(tmp_path, capsys, title, binary):
    write(tmp_path, title, binary)
    read(tmp_path)
    training, validation = capsys.readouterr().out.splitlines()
    suffix, published = ".bin" if binary else "", "10,000" if title == "CIFAR-10" else "50,000"
    assert all(f"{name}{suffix} has 40" in training for name in DATASETS[title].train)
    assert (
        training.endswith(f"; as published, {published} each")
        and f"{DATASETS[title].test}{suffix} has 40" in validation
    )
