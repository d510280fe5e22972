# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch
import torchvision

import vgg


@pytest.mark.parametrize("arch", ["vgg11", "vgg16", "vgg16_bn"])
def test_logits_are_torchvisions_for_the_same_weights(arch):
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, arch)(num_classes=10).eval()
    ours = vgg.VGG(arch, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("arch", vgg.ARCHITECTURES)
def test_parameter_names_and_shapes_are_torchvisions(arch):
    theirs = getattr(torchvision.models, arch)().state_dict()
    ours = vgg.VGG(arch).state_dict()
    assert [(name, value.shape) for name, value in ours.items()] == [
        (name, value.shape) for name, value in theirs.items()
    ]


@pytest.mark.parametrize("size", [32, 33, 64, 96])
def test_other_image_sizes_are_pooled_as_torchvision_pools_them(size):
    theirs = torchvision.models.vgg11(num_classes=10).eval()
    ours = vgg.VGG("vgg11", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_gradients_are_those_of_relu_before_the_pools():
    torch.manual_seed(2)
    theirs, ours = torchvision.models.vgg11(num_classes=10).eval(), vgg.VGG("vgg11", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model(images).square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("reference", [False, True])
def test_weights_are_read_by_every_name_they_go_by(prefix, reference):
    model = vgg.VGG("vgg11", num_classes=10)
    other = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "fc3"} if reference else {}
    renamed = {}
    for name, value in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        renamed[prefix + other.get(layer, layer) + "." + kind] = value
    back = vgg.rename(renamed)
    assert vgg.mismatch(back, model) is None
    assert list(back) == list(model.state_dict())


def test_a_mismatch_is_named():
    weights = vgg.VGG("vgg11", num_classes=10).state_dict()
    assert "classifier.6.weight is (10, 4096), here (7, 4096)" == vgg.mismatch(weights, vgg.VGG("vgg11", num_classes=7))
    del weights["features.0.bias"]
    assert vgg.mismatch(weights, vgg.VGG("vgg11", num_classes=10)) == "features.0.bias is missing"
