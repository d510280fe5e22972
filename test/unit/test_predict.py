# SPDX-License-Identifier: BSD-3-Clause
"""predict.py: images in, predictions out. test/run has its command line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from engine.data.datasets import read_digits
from engine.errors import UsageError

import predict
import vgg

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
