# SPDX-License-Identifier: BSD-3-Clause
"""The tools that prepare a dataset: a smaller copy, and ImageNet's validation images in folders by class."""

import os
import sys

from engine.data import open_datasets
from engine.data.decoding import read_rgb

from helpers.images import photo
from helpers.program import REPOSITORY, run

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.once

SHRINK = os.path.join(REPOSITORY, "tools", "shrink.py")
SORT = os.path.join(REPOSITORY, "tools", "sort_imagenet_val.py")


def shrink(*args):
    return run(sys.executable, SHRINK, *args)


# --- their command lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["--no-such-flag", "10", "{tmp}"], ["10"], ["10", ""], ["10", "{tmp}", "more"]], ids=len
)
@pytest.mark.parametrize("tool", ["download_cifar", "shrink", "sort_imagenet_val"])
def test_a_wrong_command_is_one_line_and_needs_no_torch(tmp_path, tool, words):
    path = os.path.join(REPOSITORY, "tools", f"{tool}.py")
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\nif 'shrink' not in sys.argv[0]: sys.modules['torch'] = None\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    result = run(sys.executable, "-c", code, path, *[word.format(tmp=tmp_path) for word in words])
    (line,) = result.err.splitlines()
    assert result.code == 2 and result.out == "" and line.startswith(f"tools/{tool}.py: error: "), line
    assert line.endswith(f"; see python tools/{tool}.py --help")


# --- shrink.py --------------------------------------------------------------------------------------------------------


def test_shrink_makes_images_smaller_and_continues_after_an_interruption(tmp_path):
    source, target = tmp_path / "图 片", tmp_path / "small"
    shapes = {
        "train/a/large.JPEG": (200, 100),
        "train/a/tall.png": (60, 300),
        "train/b/small.jpg": (50, 40),
        "val/b/图.webp": (90, 90),
    }
    for name, (width, height) in shapes.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(width, height, 1)).save(str(source / name))
    (source / "train" / "b" / "bad.jpg").write_bytes(b"no image")
    result = shrink(source, target, "--short-side", 48)
    assert result.code == 1, result.err
    assert " s: 4; " in result.out
    assert "; there already: 0; could not be read: 1" in result.out
    assert "bad.jpg" in result.err
    sizes = {}
    for folder, _, names in os.walk(str(target)):
        for name in names:
            path = os.path.join(folder, name)
            sizes[os.path.relpath(path, str(target))] = Image.open(path).size
    assert sizes == {
        "train/a/large.JPEG": (96, 48),
        "train/a/tall.png.jpg": (48, 240),
        "train/b/small.jpg": (50, 40),
        "val/b/图.webp.jpg": (48, 48),
    }
    assert (target / "train" / "b" / "small.jpg").read_bytes() == (source / "train" / "b" / "small.jpg").read_bytes()
    (target / "train" / "a" / "large.JPEG").unlink()
    result = shrink(source, target, "--short-side", 48)
    assert " s: 1; there already: 3; " in result.out


def test_a_smaller_image_is_the_same_image(tmp_path):
    (tmp_path / "all").mkdir()
    image = Image.fromarray(photo(400, 300, 3))
    image.save(str(tmp_path / "all" / "x.jpg"), quality=95)
    result = shrink(tmp_path / "all", tmp_path / "small", "--short-side", 60)
    assert result.code == 0, result.err
    ours = np.asarray(Image.open(str(tmp_path / "small" / "x.jpg")), int)
    assert abs(ours - np.asarray(image.resize((80, 60), Image.LANCZOS), int)).mean() < 3  # of 255


def test_a_smaller_image_keeps_its_orientation(tmp_path):
    """Turned by its EXIF data the copy is the original, turned; without that, both lie on the same side."""
    (tmp_path / "all").mkdir()
    names = [f"{orientation}.{kind}" for orientation in range(9) for kind in ("jpg", "png", "webp", "tif")]
    for name in names:
        exif = Image.Exif()
        if name[0] != "0":
            exif[0x0112] = int(name[0])
        Image.fromarray(photo(120, 90, 3)).save(str(tmp_path / "all" / name), exif=exif)
    assert shrink(tmp_path / "all", tmp_path / "small", "--short-side", 60).code == 0
    for name in names:
        original = (tmp_path / "all" / name).read_bytes()
        copy = (tmp_path / "small" / (name if name.endswith("jpg") else f"{name}.jpg")).read_bytes()
        for rotate in (False, True):
            wanted, got = (read_rgb(content, rotate) for content in (original, copy))
            wanted = np.asarray(wanted.resize(got.size, Image.LANCZOS), int)
            assert abs(np.asarray(got, int) - wanted).mean() < 4, (name, rotate)
        assert b"Exif" in copy or name[0] in "01" or name.endswith("tif")


def test_shrink_refuses_what_makes_no_sense(tmp_path):
    source = tmp_path / "all"
    (source / "train").mkdir(parents=True)
    for args in (
        [source, tmp_path / "small", "--short-side", 5],
        [source, source / "train" / "c"],
        [source, source],
        [tmp_path / "missing", tmp_path / "small"],
    ):
        result = shrink(*args)
        assert result.code == 2 and "shrink.py: error: " in result.err, args
    assert os.listdir(str(tmp_path)) == ["all"] and os.listdir(str(source)) == ["train"]


@pytest.mark.parametrize("size", [(200, 100), (60, 40)], ids=["smaller", "copied"])
@pytest.mark.parametrize("fault", ["disk", "memory"])
def test_shrink_leaves_no_image_out_for_an_error_of_the_machine(tmp_path, fault, size):
    (tmp_path / "all" / "a").mkdir(parents=True)
    for number in range(70):
        Image.fromarray(photo(*size, number)).save(str(tmp_path / "all" / "a" / f"{number:02d}.jpg"), quality=95)
    words = [sys.executable, SHRINK, tmp_path / "all", tmp_path / "small", "--short-side", "50", "--workers", "2"]
    if fault == "disk":
        result = run("bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", *words)
    else:
        code = "import runpy, sys\nfrom PIL import ImageFile\n"
        code += "def lacks(*_): raise MemoryError\nImageFile.ImageFile.load = lacks\n"
        code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
        result = run(words[0], "-c", code, *words[1:])
    (line,) = result.err.splitlines()
    assert result.code == 2 and (".jpg: File too large" if fault == "disk" else "not enough memory") in line
    assert os.listdir(str(tmp_path / "small" / "a")) == []
    assert run(*words).code == 0 and len(os.listdir(str(tmp_path / "small" / "a"))) == 70


def test_shrink_leaves_out_an_image_that_no_jpeg_can_hold(tmp_path):
    (tmp_path / "all").mkdir()
    Image.fromarray(np.zeros((40, 66000, 3), np.uint8)).save(str(tmp_path / "all" / "long.png"))
    result = shrink(tmp_path / "all", tmp_path / "small", "--short-side", 40)
    assert result.code == 1 and "long.png: left out (" in result.err.splitlines()[-1]
    assert os.listdir(str(tmp_path / "small")) == []


def make_messy_folder(root):
    """Folders as storage boxes and macOS leave them, with links, one in a loop. Returns the images of training."""
    names = ["train/a/1.jpg", "train/a/in/2.PNG", "train/b/3.webp", "val/a/4.jpe", "val/b/5.jpeg"]
    for name in [*names, "train/@eaDir/1.jpg/SYNO.jpg", "train/a/@eaDir/1.jpg", "out/6.jpg", "train/.Trash/7.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(60, 50, len(name))).save(str(root / name), "JPEG")
    for name in ("train/a/._1.jpg", ".hidden.png", "val/a/.DS_Store", "val/x.heic", "notes.txt"):
        (root / name).write_bytes(b"not an image")
    (root / "out").rename(root.parent / "out")
    (root / "val" / "b" / "link").symlink_to(root.parent / "out")
    (root / "val" / "b" / "loop").symlink_to(root / "val" / "b")
    (root / "validation").symlink_to("val")
    return [*names, "val/b/link/6.jpg", "validation/a/4.jpe", "validation/b/5.jpeg", "validation/b/link/6.jpg"]


def files_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_shrink_copies_what_training_reads(tmp_path):
    names = make_messy_folder(tmp_path / "all")
    result = shrink(tmp_path / "all", tmp_path / "small")
    assert result.code == 0 and result.err == "", result.err
    copies = [name if name.endswith(("jpg", "jpeg")) else f"{name}.jpg" for name in names]
    assert files_below(tmp_path / "small") == sorted(copies)
    left_out, summary = result.out.splitlines()
    assert left_out.startswith(f"=> {tmp_path / 'all'}: 10 files and folders left out: ") and "2 @eaDir" in left_out
    assert "; could not be read: 0" in summary and "--val-split" not in summary
    ours, copied = (
        open_datasets(str(tmp_path / name), evaluate=False, skip_unreadable=False) for name in ("all", "small")
    )
    assert [len(part) for part in ours] == [len(part) for part in copied] == [3, 3]


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff\xe9.jpg"), "-f.jpg", "a\nb.jpg", "\u56fe \u7247.JPEG"], ids=ascii)
def test_shrink_keeps_names_that_are_hard_to_write(tmp_path, name):
    (tmp_path / "all" / name).mkdir(parents=True)  # a class may be named so, too
    Image.fromarray(photo(60, 50, 1)).save(str(tmp_path / "all" / name / name), "JPEG")
    result = shrink(tmp_path / "all", tmp_path / "small")
    assert result.code == 0 and files_below(tmp_path / "small") == [os.path.join(name, name)], result.err


@pytest.mark.parametrize("names", [[], ["a/x.heic", "b/y.heic"], ["a/._x.jpg", "@eaDir/x.jpg"]], ids=" ".join)
def test_shrink_of_no_image_is_one_line(tmp_path, names):
    for name in names:
        (tmp_path / "all" / name).parent.mkdir(parents=True)
        (tmp_path / "all" / name).write_bytes(b"")
    (tmp_path / "all").mkdir(exist_ok=True)
    result = shrink(tmp_path / "all", tmp_path / "small")
    (line,) = result.err.splitlines()
    assert result.code == 2 and f"{tmp_path / 'all'}: no images in it (.jpg " in line, line
    assert ("left out: " in line) == bool(names) and result.out == "" and not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "name, said", [("a/1.png", True), ("a/1.JPG", False), ("train/a/1.png", False), ("val/a/1.png", False)]
)
def test_shrink_says_that_a_split_by_names_is_another_one(tmp_path, name, said):
    (tmp_path / "all" / name).parent.mkdir(parents=True)
    Image.fromarray(photo(60, 50, 1)).save(str(tmp_path / "all" / name))
    assert ("--val-split splits the copy differently" in shrink(tmp_path / "all", tmp_path / "small").out) == said


# --- sort_imagenet_val.py ---------------------------------------------------------------------------------------------


def flat_folder(root, count=2):
    for number in range(1, count + 1):
        (root / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(b"")


def labels_of_kaggle(root):
    path = root / "LOC_val_solution.csv"
    rows = ["ImageId,PredictionString", "ILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8"]
    path.write_text("\n".join([*rows, "ILSVRC2012_val_00000002,n01 1 2 3 4", ""]))
    return path


def labels_of_the_development_kit(root):
    scipy_io = pytest.importorskip("scipy.io")
    (root / "data").mkdir()
    record = np.array([(1, "n01"), (2, "n02")], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy_io.savemat(str(root / "data" / "meta.mat"), {"synsets": record})
    (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    return root


@pytest.mark.parametrize("labels", [labels_of_kaggle, labels_of_the_development_kit])
def test_the_validation_images_are_sorted(tmp_path, labels):
    flat_folder(tmp_path)
    result = run(sys.executable, SORT, tmp_path, labels(tmp_path))
    assert result.code == 0 and result.out.startswith("images moved: 2, classes: 2"), result.err
    assert (tmp_path / "n02" / "ILSVRC2012_val_00000001.JPEG").exists()
    assert (tmp_path / "n01" / "ILSVRC2012_val_00000002.JPEG").exists()


def test_sorting_continues_and_leaves_images_without_a_label(tmp_path):
    flat_folder(tmp_path, count=3)
    labels = labels_of_kaggle(tmp_path)
    (tmp_path / "n02").mkdir()
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").rename(tmp_path / "n02" / "ILSVRC2012_val_00000001.JPEG")
    result = run(sys.executable, SORT, tmp_path, labels)
    assert result.code == 1 and result.out.startswith("images moved: 1, classes: 2")
    assert "ILSVRC2012_val_00000003.JPEG" in result.err
    assert (tmp_path / "ILSVRC2012_val_00000003.JPEG").exists()


def test_a_file_that_holds_no_labels_is_named(tmp_path):
    flat_folder(tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for path in (tmp_path / "x.csv", tmp_path / "missing.csv"):
        result = run(sys.executable, SORT, tmp_path, path)
        assert result.code == 2 and path.name in result.err and "Traceback" not in result.err
    assert (tmp_path / "ILSVRC2012_val_00000001.JPEG").exists()


@pytest.mark.parametrize("row", ["ILSVRC2012_val_00000002", "ILSVRC2012_val_00000002,", ""])
def test_labels_that_are_cut_off_move_nothing(tmp_path, row):
    flat_folder(tmp_path)
    path = labels_of_kaggle(tmp_path)
    path.write_text(path.read_text().replace("ILSVRC2012_val_00000002,n01 1 2 3 4\n", row))
    result = run(sys.executable, SORT, tmp_path, path)
    if row:
        assert result.code == 2 and path.name in result.err and len(result.err.splitlines()) == 1, result.err
        assert (tmp_path / "ILSVRC2012_val_00000001.JPEG").exists()
    else:  # the table of another part
        assert result.code == 1 and "ILSVRC2012_val_00000002.JPEG" in result.err


@pytest.mark.parametrize("call", ["file", "os.listdir", "os.makedirs", "os.rename"])
def test_sorting_that_the_disk_refuses_is_one_line_and_continues(tmp_path, call):
    flat_folder(tmp_path)
    words = [SORT, tmp_path, labels_of_kaggle(tmp_path)]
    code = "import os, runpy, sys\n"
    if call == "file":
        (tmp_path / "n02").write_text("")
    else:  # to root nothing is read-only
        code += f"def refuse(path, *_, **__): raise PermissionError(13, 'Permission denied', path)\n{call} = refuse\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    result = run(sys.executable, "-c", code, *words)
    (line,) = result.err.splitlines()
    assert result.code == 2 and line.startswith(f"sort_imagenet_val.py: error: {tmp_path}"), line
    assert line.endswith("; run the same command again to continue")
    if call == "file":
        (tmp_path / "n02").unlink()
    assert run(sys.executable, *words).code == 0


# --- bench/loader.py --------------------------------------------------------------------------------------------------


def test_the_benchmark_of_the_loader_refuses_less_than_a_batch_and_leaves_no_file(tmp_path):
    words = [os.path.join(REPOSITORY, "bench", "loader.py"), "--width", 40, "--height", 30, "--count", 5]
    result = run(sys.executable, *words, "--workers", 2, "--batch-size", 6, env={"TMPDIR": str(tmp_path)})
    assert result.err == "loader.py: error: --batch-size 6 requires as many images, got 5\n"
    assert result.code == 2 and os.listdir(str(tmp_path)) == []
