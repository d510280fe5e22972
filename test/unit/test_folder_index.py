# SPDX-License-Identifier: BSD-3-Clause
"""The list of a folder's files, and its cache: every start sees the files that are there."""

import contextlib
import os

from engine import console
from engine.data import folder_index
from engine.data.folder_index import open_index

from helpers.images import jpeg, make_folder, photo

import pytest
from PIL import Image


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(20, 20, 1)).save(str(path))


def settle(root):
    """Make every folder an hour older: the index of one that has just changed is not trusted."""
    for folder, _, _ in os.walk(str(root)):
        os.utime(folder, (1e9, os.stat(folder).st_mtime - 3600))


def files_of(root, skip_unreadable=False):
    """(names, labels, fingerprint) of a folder's index."""
    index = open_index(str(root), skip_unreadable)
    names = [os.path.relpath(index.path(i), str(root)) for i in range(len(index.labels))]
    return names, list(index.labels), index.fingerprint


@pytest.fixture
def lists(monkeypatch):
    """The folders whose files were listed, not read from the cache."""
    listed, list_folder = [], folder_index._list_folder
    monkeypatch.setattr(folder_index, "_list_folder", lambda root: listed.append(root) or list_folder(root))
    return listed


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vgg16"


def test_a_folder_has_torchvisions_classes_files_and_order(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    names = ["b/2.jpg", "b/10.JPEG", "a/sub/1.png", "a/sub deeper/1.png", "a/0.webp", "a b/图.jpg", "a/z.jpg"]
    for name in [*names, "c/x\ny.jpg"]:
        write_image(tmp_path / name)
        (tmp_path / name).parent.joinpath("notes.txt").write_text("no image")
    theirs, ours = datasets.ImageFolder(str(tmp_path)), open_index(str(tmp_path))
    assert ours.classes == theirs.classes
    samples = [(ours.path(i), ours.labels[i]) for i in range(len(ours.labels))]
    assert samples == [tuple(sample) for sample in theirs.samples]


def test_a_loop_of_links_ends(tmp_path):
    write_image(tmp_path / "a" / "x.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert len(open_index(str(tmp_path)).labels) == 1


def test_a_second_start_reads_the_cached_index_and_sees_every_change(tmp_path, lists):
    root = tmp_path / "图 片"
    for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg"):
        write_image(root / name)
    settle(root)
    first = files_of(root)
    assert first[0] == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"] and first[1] == [0, 0, 1]
    assert files_of(root) == first and len(lists) == 1
    write_image(root / "a" / "deep" / "4.jpg")
    assert files_of(root)[0] == ["a/1.jpg", "a/deep/2.jpg", "a/deep/4.jpg", "b/3.jpg"] and len(lists) == 2
    settle(root)
    files_of(root)
    (root / "b").rename(root / "c")
    changed = files_of(root)
    assert changed[0][-1] == "c/3.jpg" and changed[2] != first[2]


def test_a_truncated_index_is_built_again(tmp_path, lists, cache_folder):
    root = tmp_path / "data"
    write_image(root / "a" / "1.jpg")
    settle(root)
    expected = files_of(root)
    (name,) = os.listdir(str(cache_folder))
    size = os.path.getsize(str(cache_folder / name))
    for length in (0, 10, size // 2, size - 5):
        os.truncate(str(cache_folder / name), length)
        assert files_of(root) == expected
    assert len(lists) == 5


def test_a_folder_that_has_just_changed_is_listed_again(tmp_path, lists):
    """It may change once more within the resolution of its time stamp."""
    write_image(tmp_path / "a" / "1.jpg")
    assert files_of(tmp_path) == files_of(tmp_path) and len(lists) == 2


def test_without_a_place_for_the_index_the_files_are_listed_each_time(tmp_path, monkeypatch, lists):
    root = os.path.join(make_folder(tmp_path, classes=2), "val")
    settle(root)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    for _ in range(2):
        assert len(open_index(root).labels) == 10
    assert len(lists) == 2


def test_unreadable_images_are_left_out_until_they_are_repaired(tmp_path, monkeypatch):
    root, counts = tmp_path / "data", []
    monkeypatch.setattr(console, "progress", lambda count, *_: counts.append(count) or contextlib.nullcontext())
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        write_image(root / name)
    (root / "a" / "2.jpg").write_bytes(jpeg(40, 30, 1)[:-100])
    settle(root)

    index = open_index(str(root), skip_unreadable=True)
    assert len(index.labels) == 2 and counts == [3]
    ((name, reason),) = index.unreadable
    assert name == str(root / "a" / "2.jpg") and "truncated" in reason
    assert files_of(root, True)[0] == ["a/1.jpg", "b/3.jpg"] and counts == [3]  # cached
    assert files_of(root)[0] == ["a/1.jpg", "a/2.jpg", "b/3.jpg"]  # unchecked, it has an index of its own
    write_image(root / "a" / "2.jpg")
    settle(root)  # the folder's time stamp says nothing of a file that was overwritten
    assert files_of(root, True)[0] == ["a/1.jpg", "a/2.jpg", "b/3.jpg"] and counts == [3, 3]
