# SPDX-License-Identifier: BSD-3-Clause
"""predict.py: images in, predictions out. test/run has its command line."""

from __future__ import annotations

import dataclasses
import json
import os
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
