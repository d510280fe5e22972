# SPDX-License-Identifier: BSD-3-Clause
"""What an evaluation computes and writes: --eval-view, --predictions, metrics.json, the page of --report; curves."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
from typing import Any

from engine.checkpoints.file import load

from helpers.images import jpeg
from helpers.program import TWO, Result, run_main
from helpers.trained import FLAGS, TorchvisionVGG, train_classifier

import pytest
import torch

HAS = [importlib.util.find_spec(name) is not None for name in ("matplotlib", "jinja2")]
needs_both = pytest.mark.skipif(not all(HAS), reason="--report requires matplotlib and jinja2")


@pytest.fixture(scope="module")
def evaluated(folder: str, tmp_path_factory: Any) -> tuple[Any, Result, Result]:
    """(folder, result of a training with an EMA, result of its evaluation on two processes, with a page)."""
    root = tmp_path_factory.mktemp("evaluated")
    trained = train_classifier(folder, root)
    flags = [folder, *FLAGS, *TWO, "-e", "--resume", root / "model_best.pth.tar", "--output-dir", root]
    result = run_main(*flags, "--report", root / "page")
    assert result.code == 0, result.err
    return root, trained, result


@pytest.fixture(scope="module")
def page(evaluated: Any) -> str:
    return (evaluated[0] / "page" / "index.html").read_text(encoding="utf-8")


@needs_both
def test_an_evaluation_gives_the_accuracy_of_the_ema_weights(evaluated: Any) -> None:
    _, trained, result = evaluated
    assert "=> evaluating the EMA weights (--ema-decay)" in result.out
    accuracies = [line for line in trained.out.splitlines() if "[AVG-ACC]" in line]
    best = max(accuracies, key=lambda line: float(line.split()[line.split().index("Acc@1") + 1]))
    assert best.split()[-4:] == ["Acc@1", result.accuracy()[0], "Acc@5", result.accuracy()[1]]


@needs_both
def test_an_evaluation_writes_its_metrics(evaluated: Any) -> None:
    root, _, result = evaluated
    metrics = json.loads((root / "metrics.json").read_text(encoding="utf-8"))
    assert (f"{metrics['acc1']:.3f}", f"{metrics['acc5']:.3f}") == result.accuracy()
    assert metrics["images"] == 15 and metrics["weights"] == str(root / "model_best.pth.tar")


def test_a_folder_of_classes_is_evaluated_whole(folder: str, tmp_path: Any) -> None:
    trained = train_classifier(folder, tmp_path)
    val = shutil.copytree(os.path.join(folder, "val"), str(tmp_path / "my test"))
    flags = [*FLAGS, "-e", "--resume", tmp_path / "model_best.pth.tar", "--output-dir"]
    # Twice with its files in the folder of the classes: none of them is a folder, and so a class.
    results = [run_main(path, *flags, output) for path, output in ((folder, tmp_path), (val, val), (val, val))]
    assert trained.code == results[0].code == results[1].code == results[2].code == 0, results[2].err
    assert results[0].accuracy() == results[1].accuracy() == results[2].accuracy()


@needs_both
def test_the_page_counts_each_image_once(evaluated: Any, page: str) -> None:
    acc1 = float(evaluated[2].accuracy()[0])
    wrong = round(15 * (100 - acc1) / 100)
    assert f"<b>{acc1:.2f}%</b>Acc@1" in page
    assert f"<b>{wrong}</b>wrong of 15" in page
    assert page.count("<figure>") == page.count("data:image/png") == wrong
    cells = re.findall(r'title="actual (class \d), predicted (class \d): (\d+)"', page)
    assert [cell[:2] for cell in cells] == [(f"class {a}", f"class {b}") for a in range(3) for b in range(3)]
    counts = [int(count) for _, _, count in cells]
    assert [sum(counts[row : row + 3]) for row in (0, 3, 6)] == [5, 5, 5]
    assert sum(counts[::4]) == 15 - wrong


@needs_both
def test_mistakes_are_shown_with_file_name_prediction_and_actual_class_most_confident_first(page: str) -> None:
    figures = re.findall(r"predicted <i>(.*?)</i> \(([\d.]+)%\)<br>\s*actual <b>(.*?)</b><small>(.*?)</small>", page)
    assert len(figures) == page.count("<figure>")
    confidences = [float(confidence) for _, confidence, _, _ in figures]
    assert confidences == sorted(confidences, reverse=True)
    for predicted, _, actual, name in figures:
        assert predicted != actual
        assert re.fullmatch(rf"{actual}/图 00[0-4]\.JPEG", name)  # below the validation folder


@needs_both
def test_the_page_has_the_curves_of_the_training_and_recall_of_each_class(page: str) -> None:
    assert "<h2>Training</h2>" in page
    assert page.count("<picture>") == 2 and 'class="matrix"' in page  # loss, accuracy
    classes = page[page.index('id="classes"') :]
    recall = [float(value) for value in re.findall(r'data-value="([\d.]+)"><span', classes)]
    assert len(recall) == 3
    assert recall == sorted(recall)


@needs_both
def test_the_page_tells_the_flags_of_the_training_from_those_of_the_evaluation(page: str) -> None:
    evaluation, training = re.findall(r"<details><summary>(.*?)</details>", page, re.DOTALL)
    assert evaluation.startswith("This evaluation") and ">eval_view<" in evaluation and ">lr<" not in evaluation
    assert training.startswith("Flags of the training") and "None" not in training
    assert '<td>lr</td><td class="name">0.02</td>' in training


@needs_both
def test_weights_from_elsewhere_get_no_curves_of_a_training_in_their_folder(evaluated: Any, folder: str) -> None:
    root = evaluated[0]
    torch.save(load(str(root / "model_best.pth.tar"))["state_dict"], str(root / "other.pth"))
    flags = [folder, *FLAGS, "-e", "--pretrained", root / "other.pth", "--output-dir", root / "o"]
    result = run_main(*flags, "--report", root / "other page")
    assert result.code == 0, result.err
    page = (root / "other page" / "index.html").read_text(encoding="utf-8")
    assert "This evaluation" in page and "training" not in page.lower()


@needs_both
def test_the_page_is_one_file_that_loads_nothing(evaluated: Any, page: str) -> None:
    names = ["confusion.csv", "index.html", "per_class.csv"]
    assert sorted(path.name for path in (evaluated[0] / "page").iterdir()) == names
    assert not re.search("https?:", page)
    assert not re.search(r'(src|srcset|href)="(?!data:|#)', page)
    assert "{{" not in page and "{%" not in page  # no placeholder is left


@needs_both
def test_names_with_markup_are_escaped_and_many_classes_get_a_filter_in_place_of_the_matrix(tmp_path: Any) -> None:
    for number in range(30):
        folder = tmp_path / "val" / f"<em>&{number:02d}<em>"
        folder.mkdir(parents=True)
        (folder / "<s>.jpg").write_bytes(jpeg(40, 40, number))
    torch.manual_seed(0)
    torch.save(TorchvisionVGG(30).state_dict(), str(tmp_path / "weights.pth"))
    flags = [tmp_path, *FLAGS, "-e", "--pretrained", tmp_path / "weights.pth", "--output-dir", tmp_path]
    result = run_main(*flags, "--report", tmp_path / "page")
    assert result.code == 0, result.err
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "<em>" not in page
    assert "<s>" not in page
    assert "&lt;em&gt;&amp;29&lt;em&gt;" in page
    assert page.count("<figure>") == 24  # of at least 25 mistakes
    assert 'id="filter"' in page
    assert "<picture>" not in page  # no training
    assert 'class="matrix"' not in page  # its cells would be too small


@pytest.mark.skipif(all(HAS), reason="matplotlib and jinja2 are installed")
def test_a_page_without_its_libraries_is_refused_before_anything_is_computed(folder: str, tmp_path: Any) -> None:
    (tmp_path / "a.pth").write_bytes(b"never read")
    result = run_main(folder, "-e", "--resume", tmp_path / "a.pth", "--report", tmp_path / "page")
    assert result.code == 2
    assert "--report requires" in result.err and not (tmp_path / "page").exists()


@pytest.mark.skipif(not HAS[0], reason="matplotlib is not installed")
def test_a_run_draws_its_curves(folder: str, tmp_path: Any) -> None:
    flags = ["--arch", "vgg11", "--image-size", 32, "-b", 8, "--epochs", 1]
    result = run_main(folder, *flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "curves.tmp.png").exists()


@pytest.mark.parametrize("name", ["model_best.pth.tar", "checkpoint.pth.tar", "metrics.jsonl", "args.json", "list.csv"])
def test_predictions_replace_no_file_but_earlier_predictions(
    folder: str, evaluated: Any, tmp_path: Any, name: str
) -> None:
    trained = shutil.copytree(str(evaluated[0]), str(tmp_path / "trained"))
    path = os.path.join(trained, name)
    if name == "list.csv":
        with open(path, "w", encoding="utf-8") as file:
            file.write("path,label,split\na.jpg,a,val\n")
    with open(path, "rb") as file:
        before = file.read()
    flags = [folder, *FLAGS, "-e", "--resume", os.path.join(trained, "model_best.pth.tar"), "--output-dir", tmp_path]
    refused = run_main(*flags, "--predictions", path)
    (line,) = refused.err.splitlines()
    assert refused.code == 2 and f"--predictions {path}: would overwrite a file of another kind" in line
    with open(path, "rb") as file:
        assert file.read() == before
    if name == "list.csv":
        results = [run_main(*flags, "--predictions", tmp_path / "p.csv") for _ in range(2)]
        assert [result.code for result in results] == [0, 0], results[1].err


# --- --eval-view, --eval-scales, --predictions ------------------------------------------------------------------------


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
