# SPDX-License-Identifier: BSD-3-Clause
"""The model against torchvision's, and the names of its weights."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any, Callable

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


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile is of torch 2")
@pytest.mark.parametrize("size", [32, 64, 100, 224])
def test_a_compiled_network_pools_as_it_does_uncompiled(size: int) -> None:
    """The default makes sizes dynamic at the second one."""
    network = narrow("vgg11")
    forward, dense = torch.compile(network, backend="eager"), torch.compile(network.forward_dense, backend="eager")
    for height, width in ((size, size), (size + 32, size + 64), (size + 101, size)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            assert torch.allclose(forward(images), network(images), rtol=0, atol=1e-5)
            assert torch.allclose(dense(images, size), network.forward_dense(images, size), rtol=0, atol=1e-5)


def test_gradients_are_those_of_relu_before_max_pool() -> None:
    ours, theirs = pair("vgg11")
    images = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model(images).pow(2).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-4), name


# --- features ---------------------------------------------------------------------------------------------------------

CFGS = vars(torchvision.models.vgg).get("cfgs") or vars(torchvision.models.vgg)["cfg"]  # cfg: torchvision 0.2.2
LETTERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


def torchvision_values(network: vgg.VGG, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of each named layer, by torchvision's layers with the weights of a narrow network."""
    arch = network.arch.replace("_bn", "")
    widths = {64: 8, 128: 8, 256: 16, 512: 16}  # narrow's
    cfg = [widths.get(width, width) for width in CFGS[LETTERS[arch]]]
    layers = torchvision.models.vgg.make_layers(cfg, batch_norm=network.arch.endswith("_bn")).eval()
    layers.load_state_dict(network.features.state_dict())
    values, stage, position = {}, 1, 0
    for layer in layers:
        images = layer(images)
        if isinstance(layer, torch.nn.ReLU):
            position += 1
            values[f"relu{stage}_{position}"] = images
        elif isinstance(layer, torch.nn.MaxPool2d):
            values[f"pool{stage}"] = images
            stage, position = stage + 1, 0
    flat = torch.nn.functional.adaptive_avg_pool2d(images, 7).flatten(1)
    values["fc6"] = network.classifier[0](flat).clamp(min=0)
    values["fc7"] = network.classifier[3](values["fc6"]).clamp(min=0)
    values["logits"] = network.classifier[6](values["fc7"])
    return values


@pytest.mark.parametrize("arch", vgg.ARCHITECTURES)
def test_the_values_of_every_layer_are_those_of_torchvision(arch: str) -> None:
    network, images = narrow(arch), torch.randn(2, 3, 96, 64)
    layers = network.layer_names()
    with torch.no_grad():
        expected = torchvision_values(network, images)
        together = network.forward_features(images, layers)
        assert list(expected) == layers == list(together)
        for layer in layers:
            assert torch.allclose(together[layer], expected[layer], rtol=0, atol=1e-5), layer
            assert torch.equal(network.forward_features(images, [layer])[layer], together[layer]), layer
        assert torch.equal(together["logits"], network(images))


def test_perceptual_losses_find_their_layers_at_the_indices_of_torchvision() -> None:
    """relu1_2, relu2_2, … of Johnson et al. are features.3, features.8, … of vgg16, before the max-pool."""
    torch.manual_seed(1)
    network = vgg.VGG("vgg16", 5, hidden=8).eval()  # torchvision's widths, but for the classifier, whose 123 M are slow
    theirs = torchvision.models.vgg.make_layers(CFGS["D"])
    theirs.load_state_dict(network.features.state_dict())
    images = torch.randn(1, 3, 64, 64)
    indices = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29, "pool5": 30}
    with torch.no_grad():
        features = network.forward_features(images, list(indices))
        for layer, index in indices.items():
            assert torch.allclose(features[layer], theirs[: index + 1](images), rtol=0, atol=1e-5), layer


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
def test_a_loss_may_use_any_layers_together(arch: str) -> None:
    """Its gradient is that of torchvision's layers, so nothing that it needs was changed in place."""
    network = narrow(arch)
    gradients = []
    for features in (network.forward_features, lambda images, _: torchvision_values(network, images)):
        torch.manual_seed(2)
        images = torch.randn(2, 3, 64, 64, requires_grad=True)
        values = features(images, network.layer_names())
        sum(value.pow(2).mean() for value in values.values()).backward()
        gradients.append(images.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_nothing_after_the_deepest_layer_is_computed() -> None:
    images = torch.randn(1, 3, 8, 8)  # too small for pool4
    features = narrow("vgg16").forward_features(images, ["relu3_1", "relu1_2"])
    assert {layer: tuple(value.shape) for layer, value in features.items()} == {
        "relu1_2": (1, 8, 8, 8),
        "relu3_1": (1, 16, 2, 2),
    }
    assert narrow("vgg16").forward_features(images, []) == {}


def test_a_layer_that_does_not_exist_is_an_error_with_those_that_do() -> None:
    network = narrow("vgg11")
    with pytest.raises(
        ValueError, match=r"vgg11 has no layer relu1_2; its layers: relu1_1, pool1, .*, pool5, fc6, fc7"
    ):
        network.forward_features(torch.randn(1, 3, 32, 32), ["relu1_1", "relu1_2"])


def test_a_linear_head_has_no_hidden_layers() -> None:
    network = vgg.VGG("vgg13", 5, (8, 8, 16, 16, 16), head="linear").eval()
    assert network.layer_names()[-2:] == ["pool5", "logits"]
    images = torch.randn(2, 3, 64, 64)
    features = network.forward_features(images, ["pool5", "logits"])
    assert torch.equal(features["logits"], network(images))
    assert torch.equal(features["logits"], network.classifier(features["pool5"].mean((2, 3))))


# --- names of weights -------------------------------------------------------------------------------------------------


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


# --- weights of other programs ----------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """A module that holds the network in a variable, as those of Lightning and Hugging Face do."""

    def __init__(self, name: str, network: torch.nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, network)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)(images)


class TimmStyle(torch.nn.Module):
    """Linear layers as convolutions, which slide over maps larger than 7×7."""

    def __init__(self, network: vgg.VGG) -> None:
        super().__init__()
        self.features = network.features
        self.pre_logits, self.head = torch.nn.Module(), torch.nn.Module()
        first, second, self.head.fc = (layer for layer in network.classifier if hasattr(layer, "weight"))
        self.pre_logits.fc1 = torch.nn.Conv2d(first.in_features // 49, first.out_features, 7)
        self.pre_logits.fc2 = torch.nn.Conv2d(second.in_features, second.out_features, 1)
        for layer, linear in ((self.pre_logits.fc1, first), (self.pre_logits.fc2, second)):
            layer.weight.data = linear.weight.data.view_as(layer.weight).clone()
            layer.bias.data = linear.bias.data.clone()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.features(images)
        size = [max(7, side) for side in maps.shape[2:]]
        maps = torch.nn.functional.adaptive_avg_pool2d(maps, size)
        hidden = self.pre_logits.fc2(self.pre_logits.fc1(maps).relu()).relu()
        return self.head.fc(hidden.mean([2, 3]))


class MmpretrainStyle(torch.nn.Module):
    """Blocks of convolution, batch normalization and ReLU, numbered together with the pools."""

    def __init__(self, network: vgg.VGG) -> None:
        super().__init__()
        blocks: list[torch.nn.Module] = []
        for layer in network.features:
            if isinstance(layer, torch.nn.Conv2d):
                blocks.append(torch.nn.Sequential(OrderedDict(conv=layer, activate=torch.nn.ReLU())))
            elif isinstance(layer, torch.nn.BatchNorm2d):
                blocks[-1] = torch.nn.Sequential(OrderedDict(conv=blocks[-1].conv, bn=layer, activate=torch.nn.ReLU()))
            elif isinstance(layer, torch.nn.MaxPool2d):
                blocks.append(layer)
        self.features, self.classifier = torch.nn.Sequential(*blocks), network.classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.nn.functional.adaptive_avg_pool2d(self.features(images), 7).flatten(1))


class PretrainedmodelsStyle(torch.nn.Module):
    """The layers as attributes of the network, as Cadene's pretrainedmodels names them."""

    def __init__(self, network: vgg.VGG) -> None:
        super().__init__()
        self._features = network.features
        self.linear0, self.linear1, self.last_linear = (
            layer for layer in network.classifier if hasattr(layer, "weight")
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.nn.functional.adaptive_avg_pool2d(self._features(images), 7).flatten(1)
        return self.last_linear(self.linear1(self.linear0(maps).relu()).relu())


class OldTorchvisionStyle(torch.nn.Module):
    """Dropout in front of each linear layer, as in torchvision before 0.1.8."""

    def __init__(self, network: vgg.VGG) -> None:
        super().__init__()
        layers = list(network.classifier)
        self.features = network.features
        self.classifier = torch.nn.Sequential(layers[2], *layers[:2], layers[5], *layers[3:5], layers[6])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.nn.functional.adaptive_avg_pool2d(self.features(images), 7).flatten(1))


def examples_style(network: vgg.VGG) -> vgg.VGG:
    """pytorch/examples wraps the convolutions alone."""
    network.features = torch.nn.DataParallel(network.features)
    return network


def with_loss(network: vgg.VGG) -> Holder:
    """A Lightning module with a weighted loss, a metric, and a VGG that is part of a loss."""
    module = Holder("model", network)
    module.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(5))
    module.perceptual_loss = Holder("vgg", torch.nn.Module())
    module.perceptual_loss.vgg.features = narrow("vgg16").features
    module.train_acc = torch.nn.BatchNorm1d(1)
    return module


def compiled(network: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile returns names its parameters so."""
    return Holder("_orig_mod", network)


def with_compiled_features(network: vgg.VGG) -> vgg.VGG:
    network.features = compiled(network.features)
    return network


PROGRAMS: dict[str, Callable[[vgg.VGG], torch.nn.Module]] = {
    "pytorch/examples": examples_style,
    "pytorch/examples, distributed": lambda network: Holder("module", examples_style(network)),
    "torch.compile": compiled,
    "torch.compile of DDP": lambda network: compiled(Holder("module", network)),
    "DDP of torch.compile": lambda network: Holder("module", compiled(network)),
    "torch.compile of the convolutions": lambda network: (
        setattr(network, "features", compiled(network.features)),
        network,
    )[1],
    "Lightning": lambda network: Holder("model", network),
    "Lightning, compiled": lambda network: Holder("model", compiled(network)),
    "Lightning with losses": with_loss,
    "backbone": lambda network: Holder("backbone", network),
    "net.encoder": lambda network: Holder("net", Holder("encoder", network)),
    "a variable named classifier": lambda network: Holder("classifier", network),
    "a variable named features": lambda network: Holder("features", network),
    "Sequential": lambda network: torch.nn.Sequential(torch.nn.Identity(), network),
    "AveragedModel": lambda network: torch.optim.swa_utils.AveragedModel(network),
    "timm": TimmStyle,
    "Hugging Face's timm": lambda network: Holder("timm_model", TimmStyle(network)),
    "mmpretrain": lambda network: Holder("backbone", MmpretrainStyle(network)),
    "pretrainedmodels": PretrainedmodelsStyle,
    "torchvision 0.1.7": OldTorchvisionStyle,
}


def narrow(arch: str, classes: int = 5) -> vgg.VGG:
    """A small VGG whose batch normalization does something and whose logits are about 1."""
    torch.manual_seed(1)
    network = vgg.VGG(arch, classes, (8, 8, 16, 16, 16), 32).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
        elif isinstance(layer, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
    return network


def loaded(weights: dict[str, torch.Tensor]) -> vgg.VGG:
    """What predict.py and export.py make of a state dict."""
    weights = vgg.to_torchvision_names(weights)
    network = vgg.network_of(weights)
    assert network is not None, vgg.describe_weights(weights)
    assert vgg.describe_mismatch(weights, network) is None
    network.load_state_dict(weights, strict=False)
    return network.eval()


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_of_other_programs_compute_what_they_compute_there(program: str, arch: str) -> None:
    if program == "AveragedModel":
        pytest.importorskip("torch.optim.swa_utils")  # torch 1.6
    source = PROGRAMS[program](narrow(arch)).eval()
    weights = source.state_dict()
    network = loaded({name: weights[name] for name in sorted(weights)})  # safetensors sorts names
    assert vgg.architecture_of(network.state_dict()) == arch
    for size in (224, 96):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(network(images), source(images), rtol=0, atol=1e-5), size


@pytest.mark.parametrize("arch", vgg.ARCHITECTURES)
@pytest.mark.parametrize("style", [TimmStyle, MmpretrainStyle])
def test_other_layer_numbers_are_understood_in_every_architecture(style: Any, arch: str) -> None:
    network = narrow(arch)
    weights = network.state_dict()
    back = vgg.to_torchvision_names(style(network).state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_timm_slides_its_linear_layers_over_larger_images() -> None:
    source = TimmStyle(narrow("vgg11")).eval()
    images = torch.randn(1, 3, 288, 256)
    with torch.no_grad():
        dense = loaded(source.state_dict()).forward_dense(images, 224)
        assert torch.allclose(dense, source(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["vgg11", "vgg16_bn"])
def test_weights_of_timm_itself(arch: str) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model(arch, num_classes=5).eval()
    network = loaded(source.state_dict())
    for size in (224, 96):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(network(images), source(images), rtol=0, atol=1e-5), size


def test_a_network_and_its_compiled_form_are_one() -> None:
    module = Holder("model", narrow("vgg11"))
    module.fast = compiled(module.model)
    assert vgg.architecture_of(loaded(module.state_dict()).state_dict()) == "vgg11"


def renamed(network: vgg.VGG, *rules: tuple[str, str]) -> dict[str, torch.Tensor]:
    weights = network.state_dict()
    for pattern, name in rules:
        weights = OrderedDict((re.sub(pattern, name, key), value) for key, value in weights.items())
    return weights


def test_entries_that_may_change_the_result_are_named() -> None:
    """An own last layer behind the network, a layer within it, normalization inside the model."""
    weights = renamed(narrow("vgg11"), ("^", "vgg."))
    for name in ("linear.weight", "vgg.attention.weight", "normalize.mean"):
        back = vgg.to_torchvision_names({**weights, name: torch.zeros(3)})
        assert name in (vgg.describe_mismatch(back, narrow("vgg11")) or ""), name


def configuration_c(batch_norm: bool) -> dict[str, torch.Tensor]:
    weights = narrow("vgg16_bn" if batch_norm else "vgg16").state_dict()
    numbers = [number for number, kernel in vgg._kernels(weights).items() if kernel]
    for number in (numbers[6], numbers[9], numbers[12]):  # the last of the stages with three
        weights[f"features.{number}.weight"] = weights[f"features.{number}.weight"][..., :1, :1]
    return weights


NO_VGG = {
    "configuration C": (lambda: configuration_c(False), "configuration C (1×1 convolutions)"),
    "configuration C, batch norm": (lambda: configuration_c(True), "configuration C (1×1 convolutions)"),
    "configuration C, prefix": (
        lambda: {f"module.{name}": value for name, value in configuration_c(False).items()},
        "configuration C (1×1 convolutions)",
    ),
    "Caffe": (lambda: renamed(narrow("vgg16"), (r"features\.0\.", "conv1_1."), (r"classifier\.0", "fc6")), "BGR"),
    "Caffe by torchvision 0.1.7": (lambda: OldTorchvisionStyle(narrow("vgg16", 1000)).state_dict(), "BGR"),
    "two VGGs": (
        lambda: {**renamed(narrow("vgg11"), ("^", "student.")), **renamed(narrow("vgg16"), ("^", "teacher."))},
        "'student.', 'teacher.'",
    ),
    "an own last layer": (lambda: renamed(narrow("vgg13"), (r"r\.6", "r.6.1")), "classifier.6.1.weight"),
    "convolutions alone": (
        lambda: {name: value for name, value in narrow("vgg19").state_dict().items() if "features" in name},
        "the convolutions of a vgg19",
    ),
    "another network": (lambda: torchvision.models.resnet18().state_dict(), "conv1.weight"),
    "thirteen convolutions": (
        lambda: {f"layer{i}.weight": torch.zeros(1, 1, 3, 3) for i in range(13)},
        "layer0.weight",
    ),
}


@pytest.mark.parametrize("kind", NO_VGG)
def test_weights_that_cannot_be_used_have_no_architecture_and_say_why(kind: str) -> None:
    build, reason = NO_VGG[kind]
    weights = vgg.to_torchvision_names(build())
    assert vgg.architecture_of(weights) is None and vgg.network_of(weights) is None
    assert reason in vgg.describe_weights(weights)


@pytest.mark.parametrize("arch, ends", [("vgg11", [3, 6, 11, 16, 21]), ("vgg16_bn", [7, 14, 24, 34, 44])])
def test_the_first_blocks_end_at_the_pools_of_torchvision(arch: str, ends: list[int]) -> None:
    """The ReLU after our pool is the one before theirs; frozen batch norm is that of the block."""
    network = vgg.VGG(arch, 2, [4] * 5, 4)
    names = [name for name, _ in network.features.named_parameters()]
    for count, end in enumerate([0, *ends]):
        frozen = [name for name, _ in network.first_blocks(count).named_parameters()]
        assert frozen == [name for name in names if int(name.split(".")[0]) < end]
    network.train().first_blocks(2).eval()
    states = [layer.training for layer in network.features]
    assert not any(states[: ends[1] - 1]) and all(states[ends[1] :])


@pytest.mark.parametrize("head", ["paper", "linear"])
def test_a_seed_gives_the_weights_of_the_layers_alone(head: str) -> None:
    """Nothing else is drawn while a network is built: the trainings of a seed stay the same."""
    torch.manual_seed(1)
    network = vgg.VGG("vgg11", 10, (8, 8, 16, 16, 16), 32, head)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    same = torch.nn.Module()
    same.features = vgg._features(vgg.DEPTHS["vgg11"], (8, 8, 16, 16, 16), batch_norm=False)
    sizes = [(16, 10)] if head == "linear" else [(784, 32), (32, 32), (32, 10)]
    same.classifier = torch.nn.ModuleList([torch.nn.Linear(*size) for size in sizes])
    same.apply(vgg._initialize)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(*pair) for pair in zip(network.state_dict().values(), same.state_dict().values()))
