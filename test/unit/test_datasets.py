# SPDX-License-Identifier: BSD-3-Clause
"""The datasets: a folder of images, CIFAR-10, the embedded digits."""

import os
import re

from engine.data import datasets
from engine.data.datasets import FileList, ImageFolder, check_same_classes, open_datasets, read_digits
from engine.data.folder_index import open_index
from engine.data.loader import ImageBatches
from engine.data.transforms import Augmentation, Preprocessing
from engine.errors import DataError, ImageError, UsageError

from helpers.images import make_folder

import numpy as np
import pytest
from PIL import Image

# --- a folder of images -----------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "图 片").mkdir()
    (tmp_path / "图 片" / "x.jpg").write_bytes(b"no image")
    dataset = ImageFolder(open_index(str(tmp_path)))

    def error_of(transform):
        error = ImageBatches(dataset, transform)[0, np.array([0])]
        assert isinstance(error, ImageError)
        return str(error)

    for transform in (Preprocessing(32), Augmentation(32)):
        assert re.search("图 片/x.jpg.*--bad-images skip", error_of(transform))
    os.remove(dataset.name(0))
    assert re.search("x.jpg.*No such file", error_of(Preprocessing(32)))


@pytest.mark.parametrize(
    "names, message",
    [([], "No such file"), (["file.jpg"], "no classes in it"), (["a/x.jpg", "b/notes.txt"], "b: no images in it")],
    ids=["no folder", "no classes", "an empty class"],
)
def test_a_folder_without_images_is_named(tmp_path, names, message):
    root = tmp_path / "data"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"data.*{message}"):
        open_index(str(root))


def test_training_and_validation_must_have_the_same_classes(tmp_path):
    root = make_folder(tmp_path, classes=2, train=1, val=1)
    training, validation = open_datasets(root, evaluate=False, skip_unreadable=False)
    assert (len(training), len(validation)) == (2, 2)
    assert open_datasets(root, evaluate=True, skip_unreadable=False)[0] is None
    os.rename(os.path.join(root, "val", "class 1"), os.path.join(root, "val", "class 2"))
    with pytest.raises(UsageError, match="number 1 is 'class 1' in train/ and 'class 2' in val/"):
        open_datasets(root, evaluate=False, skip_unreadable=False)
    with pytest.raises(UsageError, match="number 1 is 'b' in the checkpoint and missing in the data"):
        check_same_classes(["a", "b"], ["a"], "the checkpoint", "the data")


# --- one folder, split by name ----------------------------------------------------------------------------------------


def write_classes(root, counts):
    for name, count in counts.items():
        os.makedirs(os.path.join(str(root), name), exist_ok=True)
        for number in range(count):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(os.path.join(str(root), name, f"{number}.png"))


def split_names(root, share=0.2):
    """(training, validation) names below the folder."""
    datasets = open_datasets(str(root), evaluate=False, skip_unreadable=False, val_split=share)
    return [{os.path.relpath(dataset.name(i), str(root)) for i in range(len(dataset))} for dataset in datasets]


def test_a_folder_of_classes_is_split_and_adding_files_moves_none(tmp_path):
    write_classes(tmp_path, {"图": 100, "few": 2})
    training, validation = split_names(tmp_path)
    assert training.isdisjoint(validation) and len(training | validation) == 102
    assert 10 <= sum("图" in name for name in validation) <= 30
    assert sum("few" in name for name in validation) == sum("few" in name for name in training) == 1
    write_classes(tmp_path, {"图": 300})
    more_training, more_validation = split_names(tmp_path)
    assert training < more_training and validation < more_validation and len(more_training | more_validation) == 302


def test_both_parts_of_a_split_know_all_classes_and_have_their_own_fingerprint(tmp_path):
    write_classes(tmp_path, {"a": 9, "b": 9})
    first, second = open_datasets(str(tmp_path), evaluate=False, skip_unreadable=False, val_split=0.3)
    assert first.classes == second.classes == ["a", "b"] and first.fingerprint != second.fingerprint
    assert list(first.labels) == [
        first.classes.index(os.path.basename(os.path.dirname(first.name(i)))) for i in range(len(first))
    ]
    assert open_datasets(str(tmp_path), evaluate=True, skip_unreadable=False, val_split=0.3)[0] is None
    other, _ = open_datasets(str(tmp_path), evaluate=False, skip_unreadable=False, val_split=0.4)
    assert other.fingerprint != first.fingerprint


def test_a_split_that_makes_no_sense_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 1})
    with pytest.raises(DataError, match="b: a single image in this class, and a split needs two"):
        split_names(tmp_path)
    with pytest.raises(DataError, match="no train/ and val/ in it; if its folders are the classes, use --val-split"):
        open_datasets(str(tmp_path), evaluate=False, skip_unreadable=False)
    os.makedirs(str(tmp_path / "only training" / "train" / "a"))
    with pytest.raises(UsageError, match="only training is split already"):
        split_names(tmp_path / "only training")
    make_folder(tmp_path / "both")
    with pytest.raises(UsageError, match="both is split already"):
        split_names(tmp_path / "both")


def test_the_split_of_a_checkpoint_is_used_only_where_it_can_be(tmp_path):
    write_classes(tmp_path / "one", {"a": 9, "b": 9})
    split = make_folder(tmp_path / "split", classes=2)

    def shares(root, **options):
        return [dataset.val_split for dataset in open_datasets(root, evaluate=False, skip_unreadable=False, **options)]

    assert shares(str(tmp_path / "one"), saved_val_split=0.3) == [0.3, 0.3]
    assert shares(str(tmp_path / "one"), saved_val_split=0.3, val_split=0.4) == [0.4, 0.4]
    assert shares(split, saved_val_split=0.3) == shares(None, saved_val_split=0.3) == [None, None]


@pytest.mark.parametrize("name", ["test", "Testing", "val", "train", "留出 的", "a/train/b"])
@pytest.mark.parametrize("beside", [[], ["train"], ["train", "val"], ["train", "val", "test"]])
def test_an_evaluation_takes_all_images_of_a_single_folder(tmp_path, name, beside):
    for other in beside:
        write_classes(tmp_path / other, {"a": 2, "b": 3})
    write_classes(tmp_path / name / "x", {"a": 1, "b": 5})
    path = str(tmp_path / name / "x")
    for root in (path, f"{path}/", os.path.relpath(path)):
        training, validation = open_datasets(root, evaluate=True, skip_unreadable=False)
        assert training is None and validation.val_split is None
        assert validation.classes == ["a", "b"] and list(validation.labels) == [0, 1, 1, 1, 1, 1]
    with pytest.raises(DataError, match="--val-split 0.1"):
        open_datasets(path, evaluate=False, skip_unreadable=False)


@pytest.mark.parametrize("parts, other", [(["test"], "test"), (["train"], "train"), (["train", "Testing"], "Testing")])
def test_an_evaluation_of_a_folder_without_val_names_what_could_be_evaluated(tmp_path, parts, other):
    for part in parts:
        write_classes(tmp_path / part, {"a": 1, "b": 1})
    with pytest.raises(DataError, match=f"no val/ in it; to evaluate .*/{other}, use --data .*/{other}$"):
        open_datasets(str(tmp_path), evaluate=True, skip_unreadable=False)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("counts", [(9, 9), (2, 40), (1, 5)])
def test_an_evaluation_says_what_the_split_of_a_checkpoint_leaves_and_how_to_take_all(tmp_path, capsys, share, counts):
    write_classes(tmp_path / "test", dict(zip("ab", counts)))
    options = {"evaluate": True, "skip_unreadable": False, "saved_val_split": share}
    if min(counts) > 1:
        validation = open_datasets(str(tmp_path / "test"), **options)[1]
        assert f"--val-split {share} evaluates {len(validation)} of {sum(counts)} images; " in capsys.readouterr().out
    else:
        with pytest.raises(DataError, match="a split needs two; the images of a folder val/.* are all evaluated$"):
            open_datasets(str(tmp_path / "test"), **options)
    os.rename(str(tmp_path / "test"), str(tmp_path / "val"))
    assert len(open_datasets(str(tmp_path), **options)[1]) == sum(counts)
    assert "leaves" not in capsys.readouterr().out


# --- a list of images -------------------------------------------------------------------------------------------------


def open_both(root, **options):
    return open_datasets(str(root), evaluate=False, skip_unreadable=False, **options)


def list_of(root, split=True, parts=("train", "val")):
    """ROOT/list.csv with the images of make_folder in the order of the folder."""
    rows = []
    for part in parts:
        index = open_index(os.path.join(root, part))
        names = [os.fsdecode(index.name(position)) for position in range(len(index.labels))]
        rows += [f"{part}/{name},{name.split('/')[0]}" + f",{part}" * split for name in names]
    path = os.path.join(root, "list.csv")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(rows))
    return path


def test_a_list_with_a_split_has_the_images_of_the_folder_in_its_order(tmp_path):
    root = make_folder(tmp_path, classes=2, train=3, val=2)
    path, paths = list_of(root), {}
    for name in (root, path):
        training, validation = open_both(name)
        paths[name] = [(d.classes, list(d.labels), [d.name(i) for i in range(len(d))]) for d in (training, validation)]
    assert paths[root] == paths[path] and training.fingerprint != validation.fingerprint
    none, evaluated = open_datasets(path, evaluate=True, skip_unreadable=False)
    assert none is None and evaluated.fingerprint == validation.fingerprint
    assert evaluated.short_name(0) == "val/class 0/图 000.JPEG"
    with pytest.raises(UsageError, match="list.csv has a column for the split already"):
        open_both(path, val_split=0.1)


def test_a_list_without_a_split_is_split_by_name_or_evaluated_as_a_whole(tmp_path):
    root = make_folder(tmp_path, classes=2, train=9, val=1)
    path = list_of(root, split=False, parts=["train"])
    with pytest.raises(DataError, match="list.csv: no column for the split: .*--val-split 0.1"):
        open_both(path)
    training, validation = open_both(path, val_split=0.3)
    assert len(training) + len(validation) == 18 and validation.val_split == 0.3
    assert len(open_datasets(path, evaluate=True, skip_unreadable=False, saved_val_split=0.3)[1]) == len(validation)
    assert len(open_datasets(path, evaluate=True, skip_unreadable=False)[1]) == 18


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_number_without_images_is_named_and_numbers_count_from_0(tmp_path, missing, evaluate):
    """Labels that start at 1, for example."""
    write_classes(tmp_path, {"a": 8})
    labels = [label for label in range(4) if label != missing] * 2
    (tmp_path / "list.csv").write_text("".join(f"a/{row}.png,{label}\n" for row, label in enumerate(labels)))
    with pytest.raises(DataError, match=rf"^{missing}: no image of this class \(numbers of classes count from 0\)$"):
        open_datasets(str(tmp_path / "list.csv"), evaluate=evaluate, skip_unreadable=False, val_split=0.3)


def test_a_name_without_a_readable_image_is_named(tmp_path):
    write_classes(tmp_path, {"a": 4})
    (tmp_path / "a" / "3.png").write_bytes(b"no image")
    (tmp_path / "list.csv").write_text("a/0.png,cat\na/1.png,cat\na/3.png,dog\n")
    with pytest.raises(DataError, match="^dog: no image of this class$"):
        open_datasets(str(tmp_path / "list.csv"), evaluate=False, skip_unreadable=True, val_split=0.3)


def test_a_list_is_cached_until_it_or_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.folder_index.SETTLING_SECONDS", -3600)
    root = make_folder(tmp_path, classes=2, train=3, val=2)
    path = list_of(root)
    assert [open_both(path)[0].index.is_new for _ in range(2)] == [True, False]
    os.remove(open_both(path)[1].name(3))
    with pytest.raises(DataError, match="list.csv, line 10: no such file"):
        open_both(path)
    with open(path, encoding="utf-8") as file:
        rows = file.read().split("\n")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(rows[:-1]))
    training, validation = open_both(path)
    assert training.index.is_new and (len(training), len(validation)) == (6, 3)


def test_unreadable_images_of_a_list_are_left_out_and_an_empty_class_is_named(tmp_path):
    root = make_folder(tmp_path, classes=2, train=2, val=1)
    path = list_of(root)
    with open(open_both(path)[0].name(2), "wb") as file:
        file.write(b"no image")
    training, validation = open_datasets(path, evaluate=False, skip_unreadable=True)
    assert list(training.labels) == [0, 0, 1] and len(validation) == 2
    assert [os.path.basename(name) for name, _ in training.unreadable] == ["图 000.JPEG"]
    with open(training.name(2), "wb") as file:
        file.write(b"no image")
    os.utime(path)
    with pytest.raises(DataError, match="no training image of class class 1"):
        open_datasets(path, evaluate=False, skip_unreadable=True)


# --- the same file in both parts --------------------------------------------------------------------------------------


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("copies", [0, 1, 7])
def test_images_in_both_parts_are_counted_and_the_first_pair_is_named(tmp_path, capsys, split, copies):
    rng = np.random.RandomState(copies)
    for part in ("train", "val") if split else ("",):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(20):  # all of one size
                (tmp_path / part / name / f"{number}.bmp").write_bytes(rng.bytes(200))
    share = None if split else 0.4
    training, validation = open_both(tmp_path, val_split=share)
    assert "byte for byte" not in capsys.readouterr().out
    for number in range(copies):
        content = training.read(number)
        with open(validation.name(number), "wb") as file:
            file.write(content)
    os.remove(training.name(copies + 1))  # the folder changes, so a new list is made
    training, validation = open_both(tmp_path, val_split=share)
    lines = [line for line in capsys.readouterr().out.splitlines() if "byte for byte" in line]
    assert len(lines) == (copies > 0)
    for line in lines:
        assert f"{copies} of {len(validation)} validation images" in line
        first, second = re.findall(r"[^ ]+\.bmp", line)
        assert open_bytes(first) == open_bytes(second)


def test_files_are_compared_only_with_a_new_list_of_a_small_folder(tmp_path, monkeypatch):
    write_classes(tmp_path, {"a": 9, "b": 9})
    read = []
    monkeypatch.setattr(datasets, "read_file", lambda path: read.append(path) or b"")
    monkeypatch.setattr("engine.data.folder_index.SETTLING_SECONDS", -3600)
    open_both(tmp_path, val_split=0.3)
    assert len(read) == 18
    open_both(tmp_path, val_split=0.3)
    assert len(read) == 18
    write_classes(tmp_path, {"a": 10})
    monkeypatch.setattr(datasets, "COMPARED_IMAGES", 18)
    open_both(tmp_path, val_split=0.3)
    assert len(read) == 18


# --- files by name ----------------------------------------------------------------------------------------------------


def test_files_are_taken_as_given_and_folders_are_searched(tmp_path):
    write_classes(tmp_path, {"b": 2, "a": 1})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    files = FileList.find([str(tmp_path / "b" / "1.png"), str(tmp_path), "missing.jpg"])
    names = [os.path.relpath(files.name(index), str(tmp_path)) for index in range(4)]
    assert names == ["b/1.png", "a/0.png", "b/0.png", "b/1.png"] and files.name(4) == "missing.jpg"
    assert len(files) == len(files.labels) == 5 and files.read(0) == (tmp_path / "b" / "1.png").read_bytes()
    with pytest.raises(UsageError, match="empty: no images in it"):
        FileList.find([str(tmp_path / "empty")])


def test_folders_are_searched_through_links_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("in/a", "in/b/c", "out/d", "in/locked", "in/@eaDir", "in/.thumbnails"):
        write_classes(tmp_path, {name: 1})
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "out" / "d")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    (tmp_path / "in" / "x.heic").write_bytes(b"x")
    scandir = os.scandir

    def refuse(path):
        if b"locked" in os.fsencode(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files = FileList.find([str(tmp_path / "in")])
    real = sorted(os.path.relpath(os.path.realpath(name), str(tmp_path)) for name in files.paths)
    assert real == ["in/a/0.png", "in/b/c/0.png", "out/d/0.png"] and len(files.labels) == 3
    assert files.left_out == {"hidden": 1, "@eaDir": 1, ".heic": 1}
    assert sorted(re.findall("(locked|self): cannot be read", " ".join(files.errors))) == ["locked", "self"]
    with pytest.raises(UsageError, match="locked: cannot be read.*Permission"):
        FileList.find([str(tmp_path / "in" / "locked")])


# --- the embedded digits ----------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns():
    training, validation = read_digits(training=True), read_digits(training=False)
    assert (len(training), len(validation)) == (1438, 359)
    # The class counts of load_digits, https://archive.ics.uci.edu/dataset/80.
    counts = np.bincount(training.labels) + np.bincount(validation.labels)
    assert list(counts) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_an_evaluation_reads_no_training_digits():
    training, validation = open_datasets(None, evaluate=True, skip_unreadable=False)
    assert training is None and len(validation) == 359


def test_digits_are_never_mirrored():
    dataset = read_digits(training=True)
    rng = np.random.RandomState(0)
    image = dataset.images[0]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), "constant")
    crops = {padded[top : top + 32, left : left + 32].tobytes() for top in range(9) for left in range(9)}
    augmentation = Augmentation(32, hflip=dataset.default_hflip)
    assert all(augmentation(dataset.read(0), rng).tobytes() in crops for _ in range(50))
    assert np.array_equal(Preprocessing(32, crop=False)(dataset.read(0)), image)
    resized = np.asarray(Image.fromarray(image).resize((48, 48), Image.BILINEAR))
    assert np.array_equal(Preprocessing(48, crop=False)(dataset.read(0)), resized)
