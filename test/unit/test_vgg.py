# SPDX-License-Identifier: BSD-3-Clause
"""The model against torchvision's, and the names of its weights."""

from __future__ import annotations

import vgg

import pytest
import torch
import torchvision


def pair(arch: str, classes: int = 10) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, torchvision's) with the same weights, in evaluation mode."""
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, arch)(num_classes=classes).eval()
    ours = vgg.VGG(arch, num_classes=classes).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("arch", ["vgg11", "vgg16", "vgg16_bn"])
def test_logits_are_those_of_torchvision(arch: str) -> None:
    ours, theirs = pair(arch)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("arch", vgg.ARCHITECTURES)
def test_parameter_names_and_shapes_are_those_of_torchvision(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "constant_", "zeros_"):  # takes seconds
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    theirs = getattr(torchvision.models, arch)().state_dict()
    ours = vgg.VGG(arch).state_dict()
    assert [(name, value.shape) for name, value in ours.items()] == [
        (name, value.shape) for name, value in theirs.items()
    ]
    assert vgg.architecture_of(ours) == arch


def test_other_image_sizes_are_pooled_as_torchvision_pools_them() -> None:
    ours, theirs = pair("vgg11")
    for size in (32, 33, 64, 96):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(ours(images), theirs(images), rtol=0, atol=1e-5), size


def test_gradients_are_those_of_relu_before_max_pool() -> None:
    ours, theirs = pair("vgg11")
    images = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model(images).pow(2).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-4), name


@pytest.fixture(scope="module")
def network() -> vgg.VGG:
    return vgg.VGG("vgg11", num_classes=10)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("reference", [False, True], ids=["torchvision", "ModelZoo"])
def test_weights_load_under_every_name_they_go_by(network: vgg.VGG, prefix: str, reference: bool) -> None:
    layers = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "fc3"} if reference else {}
    renamed = {}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{prefix}{layers.get(layer, layer)}.{kind}"] = value
    back = vgg.to_torchvision_names(renamed)
    assert vgg.describe_mismatch(back, network) is None
    assert list(back) == list(network.state_dict())


def test_a_mismatch_is_named(network: vgg.VGG) -> None:
    weights = dict(network.state_dict())
    bias = weights.pop("features.0.bias")
    assert vgg.describe_mismatch(weights, network) == "features.0.bias is missing"
    weights = {**network.state_dict(), "features.99.bias": bias}
    assert vgg.describe_mismatch(weights, network) == "features.99.bias does not exist in this architecture"
    weights = {**network.state_dict(), "classifier.6.weight": torch.zeros(7, 4096)}
    expected = "classifier.6.weight: expected shape (10, 4096), got (7, 4096)"
    assert vgg.describe_mismatch(weights, network) == expected


def test_batch_norm_weights_without_their_counter_fit(network: vgg.VGG) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
    weights = model.state_dict()
    del weights["0.num_batches_tracked"]
    assert vgg.describe_mismatch(weights, model) is None
    del weights["0.running_mean"]
    assert vgg.describe_mismatch(weights, model) == "0.running_mean is missing"


def test_weights_of_another_network_have_no_architecture() -> None:
    assert vgg.architecture_of(torchvision.models.alexnet().state_dict()) is None
