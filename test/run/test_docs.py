# SPDX-License-Identifier: BSD-3-Clause
"""The documentation against the program: flags, commands, links, script options, and both languages."""

from __future__ import annotations

import csv
import glob
import importlib.util
import os
import re
import shlex
import shutil
import sys

from engine.options.flags import parse_args
from engine.versions import TORCH

import vgg
from helpers.program import MAIN, REPOSITORY, run, run_python, run_script

import pytest
import torch

pytestmark = pytest.mark.once

ENGLISH = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md"]
ENGLISH += sorted(os.path.relpath(path, REPOSITORY) for path in glob.glob(os.path.join(REPOSITORY, "docs", "*.md")))
CHINESE = ["README.zh-CN.md"]
CHINESE += sorted(
    os.path.relpath(path, REPOSITORY) for path in glob.glob(os.path.join(REPOSITORY, "docs", "zh", "*.md"))
)
TRANSLATED = [(name.replace("README.zh-CN", "README").replace("docs/zh/", "docs/"), name) for name in CHINESE]
PROGRAMS = ("python ", "bash ", "torchrun ", "pip ", "atc ", "sbatch ")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def text(name: str) -> str:
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        return file.read()


def code_blocks(name: str, language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE)
    return [block for block_language, block in blocks if block_language == language]


def commands(name: str) -> list[str]:
    """The command lines of a page, without their comments."""
    lines = [line.partition("  #")[0].strip() for block in code_blocks(name) for line in block.splitlines()]
    return [line for line in lines if line.startswith(PROGRAMS)]


def spellings(line: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", line))


def flag_rows(name: str) -> list[set[str]]:
    """The spellings in each row of the tables of flags."""
    rows = re.findall(r"^\| (`-.*?) \|", text(name), re.MULTILINE)
    return [spellings(row) for row in rows if "_" not in row]


# --- flags and commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs/reference.md", "docs/zh/reference.md"])
def test_every_flag_is_explained_with_all_its_spellings_and_no_other(name):
    out = run(sys.executable, MAIN, "--help", env={"COLUMNS": "200"}).out
    lines = re.findall(r"^  (-[^ ].*?)(?:   *|$)", out, re.MULTILINE)
    expected = [spellings(line) for line in lines if "--help" not in line]
    explained = flag_rows(name)
    for flags in expected:
        assert flags in explained, flags
    for flags in explained:
        assert flags in expected, flags


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_explains_fifteen_flags_as_the_reference_does(name):
    assert len(flag_rows(name)) == 15
    for flags in flag_rows(name):
        assert flags in flag_rows("docs/reference.md"), flags


@pytest.mark.parametrize("name", ENGLISH + CHINESE)
def test_commands_of_main_py_are_accepted(name, tmp_path):
    """Each command passes the checks of the flags; paths are replaced by ones that exist."""
    weights = tmp_path / "x.pth.tar"
    weights.write_bytes(b"")
    for command in commands(name):
        words = shlex.split(command)
        if "main.py" not in words:
            continue
        flags = words[words.index("main.py") + 1 :]
        flags = [str(weights) if flag.endswith((".tar", ".pth")) else flag for flag in flags]
        flags = [f"@{REPOSITORY}/{flag[1:]}" if flag.startswith("@") else flag for flag in flags]
        parse_args([str(tmp_path) if flag.startswith("/data") else flag for flag in flags])


@pytest.mark.parametrize("name", ENGLISH + CHINESE)
def test_scripts_files_and_options_exist(name):
    content = re.sub("^atc .*", "", text(name), flags=re.MULTILINE)  # another program's options
    folder = os.path.dirname(os.path.join(REPOSITORY, name))
    for path in set(re.findall(r"(?:bash|python|sbatch .*?) (?:\./)?((?:test|bench|tools)/[a-z][\w/]*\.\w+)", content)):
        assert os.path.exists(os.path.join(REPOSITORY, path)), path
    for link in re.findall(r"\]\(((?!http|#)[^)#]+)", content):
        assert os.path.exists(os.path.join(folder, link)), link
    known = set(re.findall(r"--\w+(?==)", text("test/common.sh")))
    for option in re.findall(r"(--[a-z]+_[a-z_]+)=", content):
        assert option in known, option


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(REPOSITORY, "recipes", "*.txt"))), ids=os.path.basename)
def test_recipes_are_accepted_and_listed(path):
    parse_args([f"@{path}"])
    assert f"({os.path.basename(path)})" in text("recipes/README.md")


def test_every_option_of_the_scripts_is_explained():
    for option in set(re.findall(r"(--\w+)=\*\)?", text("test/common.sh"))):
        assert f"{option}=" in text("docs/reference.md"), option


@pytest.mark.parametrize("english, chinese", TRANSLATED)
def test_both_languages_give_the_same_commands(english, chinese):
    assert commands(english) == commands(chinese)


@pytest.mark.parametrize("english, chinese", TRANSLATED)
def test_both_languages_give_the_same_results(english, chinese):
    """Percentages and ratios."""

    def results(name: str) -> set[str]:
        return set(re.findall(r"\d[\d,.]*(?:%|×(?!\d))", text(name)))

    assert results(english) == results(chinese)


def test_the_readme_is_short():
    assert 150 <= len(text("README.md").splitlines()) <= 200


# --- the commands of a user, run as they stand ------------------------------------------------------------------------

# Runs a script with small.py's network in place of VGG.
SMALL_SCRIPT = (
    "import runpy, sys; from helpers import small; sys.argv = sys.argv[1:]; "
    "small.run() if sys.argv[0].endswith('main.py') else runpy.run_path(sys.argv[0], run_name='__main__')"
)
SMALLER = ["--arch", "vgg11_bn", "--image-size", "32", "--device", "cpu", "--epochs", "1", "-b", "6"]


@pytest.fixture(scope="module")
def followed(folder, tmp_path_factory):
    """(working folder, {command: Result}) of a user who follows README and docs/deployment.md with three classes."""
    if TORCH < (2, 0):
        pytest.skip("the documentation is followed on torch 2")
    root = tmp_path_factory.mktemp("a user")
    run_python(
        "import sys, torch; from helpers import small; torch.manual_seed(0); "
        "torch.save(small.small_vgg('vgg11_bn', 5).state_dict(), sys.argv[1])",
        root / "vgg16-397923af.pth",
    )
    (root / "imagenet_classes.txt").write_text(
        'tench\ngoldfish\n"great white" shark\nhammerhead\n图\n', encoding="utf-8"
    )
    shutil.copytree(os.path.join(folder, "val", "class 1"), str(root / "holiday"))
    (root / "holiday" / "corrupt.png").write_bytes(b"not an image")
    for name in ("dog.jpg", "rose.jpg"):
        shutil.copy(str(root / "holiday" / "图 000.JPEG"), str(root / name))
    results = {}
    for command in dict.fromkeys(commands("README.md") + commands("docs/deployment.md")):
        words = shlex.split(command.partition(" > ")[0].replace("/data/flowers", shlex.quote(folder)))
        words = ["vgg16-397923af.pth" if word == "imagenet" else word for word in words]  # nothing is downloaded
        script = words[1] if words[0] == "python" else ""
        if script not in ("main.py", "predict.py", "export.py") or "/data" in command.replace("/data/flowers", ""):
            continue
        needs = {"--heatmap": "matplotlib", "--report": "matplotlib", "export.py": "onnxruntime"}
        if any(word in words and importlib.util.find_spec(package) is None for word, package in needs.items()):
            continue
        extra = SMALLER if script == "main.py" else ["--device", "cpu"] if script == "predict.py" else []
        path = os.path.join(REPOSITORY, script)
        results[command] = run(sys.executable, "-c", SMALL_SCRIPT, path, *words[2:], *extra, cwd=str(root))
        assert results[command].code == (2 if "holiday" in words else 0), (command, results[command].err)
        if "--freeze-features" in words:
            shutil.copy(str(root / "flowers" / "model_best.pth.tar"), str(root))
    return root, results


def result_of(followed, part):
    return next(result for command, result in followed[1].items() if part in command)


def test_fine_tuning_evaluating_and_predicting_work_as_documented(followed):
    root, _ = followed
    assert result_of(followed, "--report").accuracy() == result_of(followed, "--freeze-features").accuracy()
    if importlib.util.find_spec("matplotlib"):
        assert (root / "flowers" / "page" / "index.html").exists() and (root / "rose_heatmap.png").exists()
    lines = result_of(followed, "dog.jpg").out.splitlines()
    assert lines[0] == "dog.jpg" and len(lines) == 4 and re.match(r"^  1  +\d+\.\d\d%  class \d$", lines[1]), lines
    holiday = result_of(followed, "holiday")
    assert "corrupt.png: cannot be read as an image" in holiday.err and len(holiday.err.splitlines()) == 1
    rows = list(csv.reader(holiday.out.splitlines()))
    assert rows[0] == ["image", "rank", "class", "probability"] and len(rows) == 1 + 5 * 5


@pytest.mark.skipif(not HAS_ONNX, reason="onnx or onnxruntime is not installed")
def test_the_onnx_example_predicts_what_predict_py_predicts(followed):
    example = next(block for block in code_blocks("docs/deployment.md", "python") if "onnxruntime" in block)
    shown = run(sys.executable, "-c", example, cwd=str(followed[0]))
    assert shown.code == 0, shown.err
    theirs = {line.split("  ")[-1]: float(line.split("%")[0]) for line in shown.out.splitlines()}
    lines = result_of(followed, "dog.jpg").out.splitlines()[1:]
    ours = {line.split("  ")[-1]: float(line.split()[1].rstrip("%")) for line in lines}
    assert theirs == pytest.approx(ours, abs=3)  # percent: it crops before it resizes, validation resizes first


def test_the_examples_of_features_run_as_they_stand(folder, tmp_path):
    torch.save(vgg.VGG("vgg16", 5, (8, 8, 16, 16, 16), 32).state_dict(), str(tmp_path / "vgg16-397923af.pth"))
    shutil.copytree(os.path.join(folder, "val"), str(tmp_path / "photos"))
    for command in commands("docs/features.md"):
        result = run_script("predict.py", *shlex.split(command)[2:], "--device", "cpu", cwd=str(tmp_path))
        assert result.code == 0 and "15 rows of" in result.err, (command, result.err)
    examples = code_blocks("docs/features.md", "python")
    assert examples == code_blocks("docs/zh/features.md", "python")
    for name in ("perceptual_loss", "style_loss"):
        examples.append(f"print({name}(*torch.rand(2, 1, 3, 64, 48)).item())")
    shown = run(sys.executable, "-c", "\n".join(examples), cwd=str(tmp_path))
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0] == "photos/class 0/图 000.JPEG" and len(lines) == 6 + 2
    assert all(float(line.split()[0]) > 0 for line in lines[1:])
