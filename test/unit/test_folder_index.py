# SPDX-License-Identifier: BSD-3-Clause
"""The list of a folder's files, and its cache: every start sees the files that are there."""

import contextlib
import os
import shutil
import tarfile
import unicodedata

from engine import console
from engine.data import folder_index
from engine.data.folder_index import EXTENSIONS, open_index
from engine.errors import DataError

from helpers.images import jpeg, make_folder, photo

import pytest
from PIL import Image


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(20, 20, 1)).save(str(path))


@pytest.fixture
def settled(monkeypatch):
    """The index of a folder that has just changed is trusted, as if an hour had passed."""
    monkeypatch.setattr(folder_index, "SETTLING_SECONDS", -3600)


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


@pytest.mark.usefixtures("settled")
def test_a_second_start_reads_the_cached_index_and_sees_every_change(tmp_path, lists):
    root = tmp_path / "图 片"
    for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg"):
        write_image(root / name)
    first = files_of(root)
    assert first[0] == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"] and first[1] == [0, 0, 1]
    assert files_of(root) == first and len(lists) == 1
    write_image(root / "a" / "deep" / "4.jpg")
    assert files_of(root)[0] == ["a/1.jpg", "a/deep/2.jpg", "a/deep/4.jpg", "b/3.jpg"] and len(lists) == 2
    files_of(root)
    (root / "b").rename(root / "c")
    changed = files_of(root)
    assert changed[0][-1] == "c/3.jpg" and changed[2] != first[2]


@pytest.mark.usefixtures("settled")
def test_a_truncated_index_is_built_again(tmp_path, lists, cache_folder):
    root = tmp_path / "data"
    write_image(root / "a" / "1.jpg")
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


@pytest.mark.usefixtures("settled")
def test_without_a_place_for_the_index_the_files_are_listed_each_time(tmp_path, monkeypatch, lists):
    root = os.path.join(make_folder(tmp_path, classes=2), "val")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    for _ in range(2):
        assert len(open_index(root).labels) == 10
    assert len(lists) == 2


@pytest.mark.usefixtures("settled")
def test_unreadable_images_are_left_out_until_they_are_repaired(tmp_path, monkeypatch):
    root, counts = tmp_path / "data", []
    monkeypatch.setattr(console, "progress", lambda count, *_: counts.append(count) or contextlib.nullcontext())
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        write_image(root / name)
    (root / "a" / "2.jpg").write_bytes(jpeg(40, 30, 1)[:-100])

    index = open_index(str(root), skip_unreadable=True)
    assert len(index.labels) == 2 and counts == [3]
    ((name, reason),) = index.unreadable
    assert name == str(root / "a" / "2.jpg") and "truncated" in reason
    assert files_of(root, True)[0] == ["a/1.jpg", "b/3.jpg"] and counts == [3]  # cached
    assert files_of(root)[0] == ["a/1.jpg", "a/2.jpg", "b/3.jpg"]  # unchecked, it has an index of its own
    write_image(root / "a" / "2.jpg")
    assert files_of(root, True)[0] == ["a/1.jpg", "a/2.jpg", "b/3.jpg"] and counts == [3, 3]


# --- a cached list is never out of date -------------------------------------------------------------------------------


def write_version(root, version, stamp):
    """Write the folders and files of a version, or unpack them from an archive, with fixed times."""
    files = [f"{name}/{number}.jpg" for name in "ab" for number in range(4 if version == 1 else 5)]
    for name in files:
        write_image(root / name)
    for folder, _, names in os.walk(str(root)):
        for name in [*names, "."]:
            os.utime(os.path.join(folder, name), (stamp, stamp))
    return sorted(files)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("stamp", [0, 1, 1e9, 1.7e9])
def test_a_folder_with_fixed_times_is_listed_again(tmp_path, lists, stamp):
    root = tmp_path / "data"
    first = write_version(root, 1, stamp)
    assert files_of(root)[0] == files_of(root)[0] == first and len(lists) == 1
    second = write_version(root, 2, stamp)
    assert files_of(root)[0] == second and len(lists) == 2


@pytest.mark.usefixtures("settled")
def test_a_version_unpacked_over_another_is_listed_again(tmp_path, lists):
    root = tmp_path / "data"
    for version in (1, 2):
        expected = write_version(tmp_path / str(version), version, 1.5e9)
        with tarfile.open(str(tmp_path / "v.tar"), "w") as archive:
            archive.add(str(tmp_path / str(version)), "data")
        with tarfile.open(str(tmp_path / "v.tar")) as archive:
            archive.extractall(str(tmp_path))
        assert files_of(root)[0] == expected and len(lists) == version


@pytest.mark.usefixtures("settled")
def test_a_folder_in_place_of_another_is_listed_again(tmp_path, lists, monkeypatch):
    """Even if both have the same change time: inode and device differ."""
    for name in ("one", "two"):
        write_version(tmp_path / name, 1, 1e9)
    real = os.stat

    def stat(path, **options):
        fields = list(real(path, **options))
        return os.stat_result(fields, {"st_mtime_ns": 5, "st_ctime_ns": 7})

    monkeypatch.setattr(os, "stat", stat)
    (tmp_path / "data").symlink_to(tmp_path / "one")
    monkeypatch.setattr(os.path, "realpath", lambda path, **_: path)
    for _ in range(2):
        open_index(str(tmp_path / "data"))
    assert len(lists) == 1
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "two")
    open_index(str(tmp_path / "data"))
    assert len(lists) == 2


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "mtime, ctime",
    [(0, 0), (5, 0), (10**18, 10**18), (5, 10**19), (10**19, 5)],
    ids=["zero", "no_ctime", "one", "future", "ahead"],
)
def test_where_folders_have_no_time_stamps_they_are_listed_each_time(tmp_path, lists, monkeypatch, mtime, ctime):
    write_version(tmp_path / "data", 1, 1e9)
    real = os.stat

    def stat(path, **options):
        return os.stat_result(list(real(path, **options)), {"st_mtime_ns": mtime, "st_ctime_ns": ctime})

    monkeypatch.setattr(os, "stat", stat)
    for count in (1, 2, 3):
        open_index(str(tmp_path / "data"))
        assert len(lists) == count


@pytest.mark.usefixtures("settled")
def test_a_line_says_that_a_cached_list_is_used_and_what_to_delete(tmp_path, lists, cache_folder, capsys):
    write_version(tmp_path / "data", 1, 1e9)
    open_index(str(tmp_path / "data"))
    assert capsys.readouterr().out == ""
    open_index(str(tmp_path / "data"))
    (line,) = capsys.readouterr().out.splitlines()
    (name,) = os.listdir(str(cache_folder))
    assert str(cache_folder / name) in line and str(tmp_path / "data") in line and "8 images" in line
    os.remove(str(cache_folder / name))
    open_index(str(tmp_path / "data"))
    assert len(lists) == 2


@pytest.mark.parametrize("value", ["~/.cache", "~nobody-of-this-name/cache", None])
def test_without_a_home_no_folder_is_made_where_the_program_runs(tmp_path, monkeypatch, lists, value):
    write_version(tmp_path / "data", 1, 1e9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and passwd entry
    for _ in range(2):
        assert len(open_index("data").labels) == 8
    assert len(lists) == 2 and os.listdir(str(tmp_path)) == ["data"]


# --- what is left out -------------------------------------------------------------------------------------------------

NOT_IMAGES = [
    "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    "a/.thumbnails/1.png",
    "a/.ipynb_checkpoints/1-checkpoint.jpg",
    "a/deep/.hidden/1.jpg",
    "a/deep/@EADIR/1.jpg",
    "a/._1.jpg",
    "a/.DS_Store",
    "a/Thumbs.db",
    "a/1.heic",
    "a/2.HEIC",
    "a/notes.txt",
    "a/README",
    "#recycle/1.jpg",
    "@eaDir/1.jpg",
    "__MACOSX/a/._1.jpg",
    ".ipynb_checkpoints/1.jpg",
    "lost+found/x.jpg",
    "$RECYCLE.BIN/x.jpg",
    "System Volume Information/x.jpg",
    "flat.jpg",
    "labels.csv",
]


@pytest.mark.parametrize("skip", [False, True])
def test_thumbnails_and_other_files_are_left_out_and_counted(tmp_path, capsys, skip):
    for name in ("a/1.jpg", "a/deep/1.jpg", "b/1.jpg"):
        write_image(tmp_path / name)
    for name in NOT_IMAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "b" / "1.jpg").read_bytes())
    index = open_index(str(tmp_path), skip)
    assert index.classes == ["a", "b"] and [index.name(i) for i in range(3)] == [
        b"a/1.jpg",
        b"a/deep/1.jpg",
        b"b/1.jpg",
    ]
    assert len(index.labels) == 3 and sum(index.left_out.values()) == len(NOT_IMAGES)
    kinds = {".heic": 2, ".txt": 1, "without an ending": 1, "hidden": 6, "@eaDir": 2, "not in a class": 1, ".csv": 1}
    assert kinds.items() <= index.left_out.items()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert f"{len(NOT_IMAGES)} files and folders left out: 6 hidden, 2 " in line and str(tmp_path) in line


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JFIF", ".Jpe", ".avif", ".jpg", ".webp", ".tiff"])
def test_what_pillow_reads_is_read(tmp_path, ending):
    from PIL import features

    write_image(tmp_path / "a" / "x.jpg")
    (tmp_path / "a" / "x.jpg").rename(tmp_path / "a" / f"x{ending}")
    (tmp_path / "b").mkdir()
    shutil.copy(str(tmp_path / "a" / f"x{ending}"), str(tmp_path / "b" / "y.jpg"))
    if ending == ".avif" and "avif" not in features.get_supported():
        assert ".avif" not in EXTENSIONS
        with pytest.raises(DataError, match="1 .avif"):
            open_index(str(tmp_path))
    else:
        index = open_index(str(tmp_path), skip_unreadable=True)
        assert [index.name(i).decode() for i in range(2)] == [f"a/x{ending}", "b/y.jpg"]


@pytest.mark.parametrize("ending", [".heic", ".gif", ".xyz"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_class_of_other_files_is_named_with_their_ending(tmp_path, ending, skip):
    write_image(tmp_path / "a" / "1.jpg")
    for name, other in (("a", ending), ("a", ".txt"), ("b", ending), ("c", ".csv")):  # only those of b count
        (tmp_path / name).mkdir(exist_ok=True)
        for number in range(3):
            (tmp_path / name / f"{number}{other.upper()}").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"b: no images in it \([^;]*; 3 files and folders left out: 3 {ending}\)$"):
        open_index(str(tmp_path), skip_unreadable=skip)


# --- names of classes -------------------------------------------------------------------------------------------------

NAMES = ["e", "é", "f", "über", "z", "ñandú", "한국"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_class_names_are_the_same_on_every_system(tmp_path, form):
    for name in NAMES:
        write_image(tmp_path / unicodedata.normalize(form, name) / f"{len(name)}.jpg")
    index = open_index(str(tmp_path))
    assert index.classes == sorted(unicodedata.normalize("NFC", name) for name in NAMES)
    for position, label in enumerate(index.labels):
        folder = os.path.basename(os.path.dirname(index.path(position)))
        assert unicodedata.normalize("NFC", folder) == index.classes[label] and os.path.isfile(index.path(position))


def test_two_folders_of_one_name_are_shown_apart(tmp_path):
    for form in ("NFC", "NFD"):
        write_image(tmp_path / unicodedata.normalize(form, "é") / "1.jpg")
    with pytest.raises(DataError, match=r"'e\\u0301' and '\\xe9'|'\\xe9' and 'e\\u0301'"):
        open_index(str(tmp_path))
