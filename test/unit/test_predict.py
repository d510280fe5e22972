# SPDX-License-Identifier: BSD-3-Clause
"""predict.py: images in, predictions out. test/run has its command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

from engine.data.datasets import read_digits
from engine.errors import UsageError

import predict
import vgg

import numpy as np
import pytest
import torch
from PIL import Image

CPU = ["--device", "cpu"]


def test_digits_are_prepared_as_for_validation(tmp_path: Any, capsys: Any) -> None:
    dataset = read_digits(training=False)
    preprocessing = dataclasses.replace(dataset.preprocessing, image_size=48)
    network = vgg.VGG("vgg11", 10)
    checkpoint = {
        "state_dict": network.state_dict(),
        "classes": dataset.classes,
        "preprocessing": preprocessing.to_dict(),
    }
    torch.save(checkpoint, str(tmp_path / "digits.pth"))
    Image.fromarray(dataset.images[7]).save(str(tmp_path / "7.png"))
    words = [str(tmp_path / "7.png"), "--checkpoint", str(tmp_path / "digits.pth"), *CPU]
    assert predict.main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    image = torch.from_numpy(preprocessing(dataset.read(7)).copy()).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        expected = network.eval()((image.float() / 255 - preprocessing.mean[0]) / preprocessing.std[0]).softmax(1)[0]
    assert record["image"] == words[0]
    assert len(record["predictions"]) == 5
    for item in record["predictions"]:
        assert item["probability"] == pytest.approx(expected[int(item["class"])].item(), abs=1e-5)
    (tmp_path / "names").write_text("zero\none\n")
    with pytest.raises(UsageError, match="names has 2 class names, the network has 10 classes"):
        predict.main([*words, "--classes", str(tmp_path / "names")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> str:
    """Weights of ten classes, for images of 32 pixels."""
    path = str(tmp_path_factory.mktemp("weights") / "digits.pth")
    dataset = read_digits(training=False)
    values = {"classes": dataset.classes, "preprocessing": dataset.preprocessing.to_dict()}
    torch.save({"state_dict": vgg.VGG("vgg11", 10).state_dict(), **values}, path)
    return path


def test_a_folder_that_cannot_be_read_is_named_and_the_rest_is_predicted(
    checkpoint: str, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    for name in ("in/a", "in/locked", "out", "in/@eaDir"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(str(tmp_path / name / "x.png"))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "y.heic").write_bytes(b"")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if b"locked" in os.fsencode(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert predict.main([str(tmp_path / "in"), "--checkpoint", checkpoint, *CPU, "--json"]) == 2
    out, err = capsys.readouterr()
    names = [os.path.relpath(json.loads(line)["image"], str(tmp_path)) for line in out.splitlines()]
    assert names == ["in/a/x.png", "in/link/x.png"]
    assert f"{tmp_path / 'in' / 'locked'}: cannot be read (Permission denied)" in err
    assert "2 files and folders left out: " in err and "1 @eaDir" in err and "1 .heic" in err


@pytest.mark.parametrize(
    "name", ["a$b$c.png", "$x$.png", "$\\frac$.png", "$$.png", "5$.png", "a\\$b$$.png", "$_^$ %d.png"]
)
def test_a_heatmap_has_the_names_as_they_are(monkeypatch: Any, name: str) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    predictions = [predict.Prediction(f"${number}$", 0.5) for number in range(5)]
    row = predict.HeatmapRow(f"in/{name}", np.zeros((8, 8, 3), np.uint8), torch.ones(1, 1), predictions)
    predict.draw_heatmaps([row], "map.png")
    (drawing,) = drawn
    drawing.canvas.draw()  # a formula that cannot be read is an error here
    titles = [axis.get_title(loc="left") for axis in drawing.axes]
    texts = [title for title in titles if title] + [text.get_text() for text in drawing.axes[2].texts]
    assert len(texts) == 2 + 5
    for text in texts:
        shown, is_formula = drawing.axes[0].title._preprocess_math(text)
        assert not is_formula and (shown == name or "$" in shown)


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "big5", "euc_kr"])
def test_a_heatmap_of_names_that_are_not_utf_8_is_drawn(tmp_path: Any, encoding: str) -> None:
    pytest.importorskip("matplotlib")
    name = os.fsdecode("中一".encode(encoding))  # as an archive from Windows unpacks
    row = predict.HeatmapRow(name, np.zeros((8, 8, 3), np.uint8), torch.ones(1, 1), [predict.Prediction(name, 0.5)])
    predict.draw_heatmaps([row], str(tmp_path / "map.png"))
    assert Image.open(str(tmp_path / "map.png")).size[0] > 500


def test_the_heatmap_is_grad_cam() -> None:
    """Against the definition, by finite differences of the logit of the top prediction."""
    torch.manual_seed(0)
    network = vgg.VGG("vgg11", 4)
    network.classifier = torch.nn.Linear(512 * 7 * 7, 4)  # small, for a thousand forward passes
    network.eval().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    heat, logits = predict.grad_cam(network, images)
    assert torch.allclose(logits, network(images))
    assert heat.shape == (2, 4, 4)
    maps = torch.relu(network.features[:-2](images)).detach()

    def top_logit(maps: torch.Tensor, index: int) -> torch.Tensor:
        return network.classify(network.features[-2](maps))[index, logits[index].argmax()]

    with torch.no_grad():
        for index in range(2):
            gradients = []
            for channel in range(512):
                change = torch.zeros_like(maps)
                change[index, channel] = 1e-6
                gradients.append((top_logit(maps + change, index) - top_logit(maps, index)) / 1e-6 / 16)
            expected = torch.relu((torch.stack(gradients).view(-1, 1, 1) * maps[index]).sum(0))
            assert torch.allclose(heat[index], expected / expected.max(), atol=1e-3)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: Any) -> Any:
    """A folder with narrow.pth, a small vgg11 for images of 64 pixels, and images/, one of which is corrupt."""
    root = tmp_path_factory.mktemp("narrow")
    dataset = read_digits(training=False)
    torch.manual_seed(0)
    network = vgg.VGG("vgg11", 10, (8, 8, 16, 16, 16), 32)
    preprocessing = dataclasses.replace(dataset.preprocessing, image_size=64)
    torch.save({"state_dict": network.state_dict(), "preprocessing": preprocessing.to_dict()}, str(root / "narrow.pth"))
    (root / "images").mkdir()
    for number in range(4):
        Image.fromarray(dataset.images[number]).save(str(root / "images" / f"{number}\n.png"))
    (root / "images" / "2 is not an image.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("name", ["0\n.png", "./0\n.png", "link.png"])
def test_a_heatmap_never_overwrites_an_input_image(narrow: Any, tmp_path: Any, monkeypatch: Any, name: str) -> None:
    pytest.importorskip("matplotlib")
    content = (narrow / "images" / "0\n.png").read_bytes()
    (tmp_path / "0\n.png").write_bytes(content)
    (tmp_path / "link.png").symlink_to("0\n.png")
    monkeypatch.chdir(tmp_path)
    for images in (["0\n.png"], [str(tmp_path)]):
        flags = [*images, "--checkpoint", str(narrow / "narrow.pth"), *CPU, "--heatmap", name]
        with pytest.raises(UsageError, match="would overwrite an input image: choose another name$"):
            predict.main(flags)
        assert (tmp_path / "0\n.png").read_bytes() == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("mode", [[], ["--json"], ["--csv"], ["--heatmap", "new.png"]], ids=" ".join)
def test_predictions_that_are_not_finite_are_an_error(
    narrow: Any, tmp_path: Any, monkeypatch: Any, capsys: Any, mode: list[str], value: float
) -> None:
    if "--heatmap" in mode:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    content = torch.load(str(narrow / "narrow.pth"))
    content["state_dict"]["classifier.6.weight"][3] = value
    content["state_dict"]["classifier.3.bias"][:] = 1e38
    torch.save(content, "x.pth")
    with pytest.raises(UsageError, match="^x.pth: its predictions are not finite: "):
        predict.main([str(narrow / "images" / "0\n.png"), "--checkpoint", "x.pth", *CPU, *mode])
    assert capsys.readouterr().out in ("", "image,rank,class,probability\n")
    assert os.listdir(str(tmp_path)) == ["x.pth"]


MAPS = {"relu1_1": (8, 64, 64), "pool1": (8, 32, 32), "relu4_2": (16, 8, 8), "relu5_2": (16, 4, 4), "pool5": (16, 2, 2)}
VECTORS = {"fc6": 32, "fc7": 32, "logits": 10}


@pytest.mark.parametrize("batch_size", [3, 32])
@pytest.mark.parametrize(
    "layer, pool",
    [*((layer, pool) for layer in MAPS for pool in (None, "avg", "max", "none")), *((v, None) for v in VECTORS)],
)
def test_features_are_those_of_the_layer_a_row_per_readable_image(
    narrow: Any, tmp_path: Any, capsys: Any, monkeypatch: Any, layer: str, pool: str | None, batch_size: int
) -> None:
    monkeypatch.setattr(predict, "available_cores", lambda: 0)  # no worker processes
    path = str(tmp_path / "new" / "x.npy")
    words = [str(narrow / "images"), "--checkpoint", str(narrow / "narrow.pth"), *CPU, "-b", str(batch_size)]
    words += ["--features", layer, "--output", path, *(["--pool", pool] if pool else [])]
    assert predict.main(words) == 2  # an image could not be read
    out, err = capsys.readouterr()
    assert out == "" and "2 is not an image.png: cannot be read" in err and len(err.splitlines()) == 2
    features = np.load(path)
    model = predict.load_model(str(narrow / "narrow.pth"))
    dataset, mean, std = read_digits(training=False), model.preprocessing.mean[0], model.preprocessing.std[0]
    pixels = np.stack([model.preprocessing(dataset.images[number]) for number in range(4)])
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        expected = model.network.forward_features(inputs, [layer])[layer].numpy()
    if layer in MAPS and pool != "none":
        expected = expected.max((2, 3)) if pool == "max" else expected.mean((2, 3))
    assert features.dtype == np.float32
    assert features.shape == (
        4,
        *([VECTORS[layer]] if layer in VECTORS else MAPS[layer][: None if pool == "none" else 1]),
    )
    assert np.allclose(features, expected, rtol=0, atol=1e-5)
    names = (tmp_path / "new" / "x.txt").read_text(encoding="utf-8").splitlines()
    assert names == [f"{narrow / 'images'}/{number}\\n.png" for number in range(4)]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--features relu1_2 --output new/x.npy",
            "--features relu1_2: no such layer in this vgg11; its layers: relu1_1, pool1",
        ),
        ("--features fc8 --output new/x.npy", "its layers: .* fc6, fc7, logits$"),
        ("--features fc7", "^--features requires --output FILE.npy$"),
        ("--features fc7 --output new/x.csv", "^--features requires --output FILE.npy, got new/x.csv$"),
        ("--features fc7 --output images.npy", "^--output images.npy: expected a file, this is a folder$"),
        ("--features fc7 --output notes.npy", "^--output notes.txt: expected a file, this is a folder$"),
        ("--features fc7 --output new/x.npy --pool max", "^--pool max: fc7 has no maps to pool: leave it out$"),
        ("--features logits --output new/x.npy --pool avg", "^--pool avg: logits has no maps"),
        ("--features pool5 --output new/x.npy --heatmap x.png", "leave --heatmap out$"),
        ("--features fc7 --output ./x.npy --classes x.txt", "^--output ./x.npy: would overwrite --classes x.txt: "),
        ("--features fc7 --output x.npy --classes ./x.txt", "^--output x.npy: would overwrite --classes ./x.txt: "),
        ("--features fc7 --output mine.npy", "^--output mine.npy: would overwrite mine.txt: choose another name$"),
        ("--output new/x.npy", "^--output requires --features LAYER$"),
        ("--pool none", "^--pool requires --features LAYER$"),
    ],
)
def test_flags_of_features_that_do_not_fit_leave_no_file(
    narrow: Any, tmp_path: Any, monkeypatch: Any, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("images.npy", "notes.txt"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.txt").write_text("important")
    flags = [str(narrow / "images"), "--checkpoint", str(narrow / "narrow.pth"), *CPU, *words.split()]
    with pytest.raises(UsageError, match=message):
        predict.main(flags)
    assert sorted(os.listdir(str(tmp_path))) == ["images.npy", "mine.txt", "notes.txt"]
    assert (tmp_path / "mine.txt").read_text() == "important"


def test_features_do_not_replace_the_checkpoint_that_they_are_of(narrow: Any, tmp_path: Any) -> None:
    checkpoint = shutil.copy(str(narrow / "narrow.pth"), str(tmp_path / "x.txt"))
    (tmp_path / "x.npy").write_text("features of before")
    flags = ["--checkpoint", checkpoint, *CPU, "--features", "fc7", "--output", str(tmp_path / "x.npy")]
    with pytest.raises(UsageError, match="would overwrite --checkpoint .*x.txt: choose another name$"):
        predict.main([str(narrow / "images"), *flags])


def test_features_of_no_readable_image_are_no_file(narrow: Any, tmp_path: Any, capsys: Any) -> None:
    flags = ["--checkpoint", str(narrow / "narrow.pth"), *CPU, "--features", "fc7", "--output", str(tmp_path / "x.npy")]
    assert predict.main([str(narrow / "images" / "2 is not an image.png"), *flags]) == 2
    assert os.listdir(str(tmp_path)) == [] and len(capsys.readouterr().err.splitlines()) == 1
