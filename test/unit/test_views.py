# SPDX-License-Identifier: BSD-3-Clause
"""Evaluation from several views of each image, against the network slid over it and torchvision's TenCrop."""

from __future__ import annotations

from typing import Any

from engine.data import Preprocessing
from engine.device.compute import ComputeDevice
from engine.evaluation.views import ViewAverage, crop_positions
from engine.records import cross_entropy

import vgg
from helpers.images import photo

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms


@pytest.fixture
def network() -> vgg.VGG:
    """A narrow VGG whose predictions differ from image to image, in evaluation mode."""
    torch.manual_seed(0)
    network = vgg.VGG("vgg11", 5, (8, 8, 16, 16, 16), 32).eval()
    for layer in network.classifier:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
    return network.requires_grad_(False)


def normalize(images: torch.Tensor) -> torch.Tensor:
    return ComputeDevice("cpu").normalizer(Preprocessing().mean, Preprocessing().std)(images)


def whole(height: int, width: int, count: int = 2) -> torch.Tensor:
    """(count, height, width, 3) uint8"""
    return torch.from_numpy(np.stack([photo(width, height, seed) for seed in range(count)]))


def probabilities(network: vgg.VGG, images: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of one group of images."""
    average = ViewAverage(network, normalize, **options)
    return average([(torch.arange(len(images)), images)]).exp()


# --- dense ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 224, 288])
def test_dense_on_a_crop_is_the_mean_of_the_crop_and_its_mirror_image(network: vgg.VGG, size: int) -> None:
    images = whole(size, size)
    dense = probabilities(network, images, view="dense", size=size, mirrored=True)
    crops = normalize(images)
    expected = (network(crops).softmax(1) + network(crops.flip(3)).softmax(1)) / 2
    assert torch.allclose(dense, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # the network tells the images apart


@pytest.mark.parametrize("size", [32, 64, 224])
def test_dense_logits_are_those_of_the_classifier_slid_over_the_maps(network: vgg.VGG, size: int) -> None:
    """Window by window, one every 32 pixels: the windows see the rest of the image where a crop sees zeros."""
    images, side = normalize(whole(size + 70, size + 133)), size // 32
    maps = network.features(images)
    rows, columns = maps.shape[2] - side + 1, maps.shape[3] - side + 1
    windows = [
        network.classify(maps[..., top : top + side, left : left + side])
        for top in range(rows)
        for left in range(columns)
    ]
    assert rows * columns > 6
    assert torch.allclose(network.forward_dense(images, size), torch.stack(windows).mean(0), rtol=0, atol=1e-5)


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(40, 57), (41, 40), (32, 32)])
def test_ten_crops_are_torchvisions(network: vgg.VGG, height: int, width: int) -> None:
    images = whole(height, width, 1)
    crops = transforms.TenCrop(32)(Image.fromarray(images[0].numpy()))
    expected = network(normalize(torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])))).softmax(1).mean(0)
    found = probabilities(network, images, view="ten-crop", size=32, mirrored=True)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_multi_crop_is_a_grid_of_five_by_five_from_edge_to_edge() -> None:
    positions = crop_positions("multi-crop", 256, 384, 224)
    assert len(set(positions)) == 25
    assert {top for top, _ in positions} == {0, 8, 16, 24, 32}
    assert {left for _, left in positions} == {0, 40, 80, 120, 160}


def test_without_mirror_images_one_centered_crop_is_the_network_itself(network: vgg.VGG) -> None:
    images = whole(32, 32)
    for view in ("center", "ten-crop", "multi-crop", "dense"):
        found = probabilities(network, images, view=view, size=32, mirrored=False)
        assert torch.allclose(found, network(normalize(images)).softmax(1), rtol=0, atol=1e-5), view


def test_scales_and_sizes_are_averaged_image_by_image(network: vgg.VGG) -> None:
    """Two images whose sizes differ, each at two scales, in the order that the loader groups them."""
    first, second = whole(40, 50, 1), whole(50, 40, 1)
    larger = [whole(48, 60, 1), whole(60, 48, 1)]
    groups = [(torch.tensor([0]), first), (torch.tensor([0]), larger[0])]
    groups += [(torch.tensor([1]), larger[1]), (torch.tensor([1]), second)]
    options = {"view": "ten-crop", "size": 32, "mirrored": True}
    found = ViewAverage(network, normalize, **options)(groups).exp()
    for position, pair in enumerate([(first, larger[0]), (second, larger[1])]):
        expected = sum(probabilities(network, images, **options)[0] for images in pair) / 2
        assert torch.allclose(found[position], expected, rtol=0, atol=1e-6)


def test_a_very_wrong_prediction_has_a_finite_loss(network: vgg.VGG) -> None:
    network.classifier[-1].bias[0] = 1000.0
    logits = ViewAverage(network, normalize, view="dense", size=32, mirrored=True)(
        [(torch.tensor([0]), whole(40, 40, 1))]
    )
    assert 500 < cross_entropy(logits, torch.tensor([1])).item() < 2000
