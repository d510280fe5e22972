# SPDX-License-Identifier: BSD-3-Clause
"""VGG-11, 13, 16 and 19, with and without batch normalization, and the other names that their weights go by.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556, table 1.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from itertools import accumulate
from typing import Callable, Iterator, Match, Sequence

import torch
from torch import nn

# Convolutions in each of the five stages: columns A, B, D and E of the paper's table 1.
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)  # output channels of each stage
HIDDEN = 4096  # of the two hidden linear layers
ARCHITECTURES = sorted(DEPTHS) + sorted(f"{name}_bn" for name in DEPTHS)
# The layers after the convolutions: the paper's three linear layers on 7×7 maps (torchvision's names), or one linear
# layer on the mean of the maps, for small images: 14.7 M parameters instead of 134 M (names of kuangliu/pytorch-cifar).
HEADS = {"paper": ("classifier.0", "classifier.3", "classifier.6"), "linear": ("classifier",)}


class VGG(nn.Module):
    """Images to logits.

    Layer numbers, and so parameter names, are torchvision's. Each stage's last ReLU comes after its max-pool, where
    torchvision has it before: the two commute exactly, and the ReLU then touches a quarter of the memory.
    """

    def __init__(
        self,
        arch: str = "vgg16",
        num_classes: int = 1000,
        widths: Sequence[int] = WIDTHS,
        hidden: int = HIDDEN,
        head: str = "paper",
    ) -> None:
        super().__init__()
        self.arch, self.head = arch, head
        self.features = _features(DEPTHS[arch.replace("_bn", "")], widths, batch_norm=arch.endswith("_bn"))
        self.classifier: nn.Module
        if head == "linear":
            self.classifier = nn.Linear(widths[-1], num_classes)
        else:
            self.classifier = nn.Sequential(
                nn.Linear(widths[-1] * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )
        self.apply(_initialize)

    def first_blocks(self, count: int) -> nn.Sequential:
        """Return the layers of the first `count` of the five blocks, each of which ends in a max-pool."""
        pools = [number for number, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        return self.features[: [-1, *pools][count] + 1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W) floating point, normalized, H and W at least 32. Returns logits (N, num_classes)."""
        return self.classify(self.features(images))

    def forward_dense(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """Return the mean of the logits at all positions of larger images, for a network trained on `size` pixels.

        The linear layers slide over the maps, one position every 32 pixels: convolutions, as in the paper's section
        3.2. images: (N, 3, H, W), H and W at least `size`. Returns (N, num_classes).
        """
        maps, side = self.features(images), size // 32
        windows = maps.unfold(2, side, 1).unfold(3, side, 1)  # (N, 512, rows, columns, side, side)
        logits = self.classify(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return logits.view(len(images), -1, logits.shape[1]).mean(1)

    def classify(self, maps: torch.Tensor) -> torch.Tensor:
        """maps: (N, 512, h, w), the output of `features`. Returns logits (N, num_classes)."""
        if self.head == "linear":
            return self.classifier(maps.mean((2, 3)))
        return self.classifier(_flatten_7x7(maps))

    def layer_names(self) -> list[str]:
        """Return the names that forward_features knows, in order: relu1_1, …, pool5, fc6, fc7, logits."""
        return [name for _, name in self._steps() if name]

    def forward_features(self, images: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return {name: values} of some layers, by the names of layer_names; nothing after the deepest is computed.

        images: as for `forward`. Maps are (N, C, h, w), fc6, fc7 and logits (N, C). No value is changed later, so a
        loss may use any of them. Raises ValueError if a layer does not exist.
        """
        known = self.layer_names()
        unknown = [layer for layer in layers if layer not in known]
        if unknown:
            raise ValueError(f"{self.arch} has no layer {unknown[0]}; its layers: {', '.join(known)}")
        values: dict[str, torch.Tensor] = {}
        steps = self._steps()
        while len(values) < len(set(layers)):
            step, name = next(steps)
            images = step(images)
            if name in layers:
                values[name] = images
        return values

    def _steps(self) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], str]]:
        """Return the functions that `forward` consists of, and the names of their results, empty for most.

        A stage's last ReLU comes before its max-pool here, so that its result exists. A ReLU works in place on what
        has no name: the result of a convolution, batch norm or linear layer.
        """
        stage, position = 1, 0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield torch.relu_, f"relu{stage}_{position}"
                yield layer, f"pool{stage}"
                stage, position = stage + 1, 0
            elif not isinstance(layer, nn.ReLU):
                position += isinstance(layer, nn.Conv2d)
                yield layer, ""
            elif position:  # not the one after a max-pool
                yield torch.relu_, f"relu{stage}_{position}"
        if not isinstance(self.classifier, nn.Sequential):  # --head linear
            yield self.classify, "logits"
            return
        yield _flatten_7x7, ""
        names = iter(("fc6", "fc7"))
        for layer in self.classifier[:-1]:
            yield (torch.relu_, next(names)) if isinstance(layer, nn.ReLU) else (layer, "")
        yield self.classifier[-1], "logits"


def _features(depths: tuple[int, ...], widths: Sequence[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for depth, width in zip(depths, widths):
        for position in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            if position == depth - 1:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            layers.append(nn.ReLU(inplace=True))
            channels = width
    return nn.Sequential(*layers)


def _flatten_7x7(maps: torch.Tensor) -> torch.Tensor:
    """Average (N, C, H, W) to 7×7 and flatten it: (N, C·49), in (C, H, W) order whatever the memory format."""
    return torch.flatten(_average_pool_7x7(maps).contiguous(), 1)


def _average_pool_7x7(maps: torch.Tensor) -> torch.Tensor:
    """Average (N, C, H, W) to (N, C, 7, 7). At 224 pixels the maps are 7×7 already, at 32 they are single points."""
    height, width = (int(side) for side in maps.shape[-2:])  # constants, also where the network is traced
    if (height, width) == (7, 7):
        return maps
    if (height, width) == (1, 1):
        return maps.expand(-1, -1, 7, 7)
    # The values of F.adaptive_avg_pool2d, computed by means whose backward pass is deterministic on a GPU too.
    for dim, length in ((2, height), (3, width)):
        bins = [(length * i // 7, -(-length * (i + 1) // 7)) for i in range(7)]
        maps = torch.stack([maps.narrow(dim, start, end - start).mean(dim) for start, end in bins], dim)
    return maps


def _initialize(layer: nn.Module) -> None:
    """As the reference (ModelZoo's VGG16, after torchvision's vgg.py): Kaiming fan-out, linear layers N(0, 0.01)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- the names of weights ---------------------------------------------------------------------------------------------

# What DataParallel, torch.compile and FSDP put into the middle of a name.
WRAPPER = re.compile(r"(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
RENAMED = [
    (re.compile(rf"(?<![^.])(?:{theirs})\."), f"{ours}.")
    for theirs, ours in (  # ModelZoo, timm, pretrainedmodels, torchvision before 0.1.8
        (r"fc1|pre_logits\.fc1|linear0|classifier\.1", "classifier.0"),
        (r"fc2|pre_logits\.fc2|linear1|classifier\.4", "classifier.3"),
        (r"fc3|head\.fc|last_linear", "classifier.6"),
        (r"_features", "features"),
    )
]
# Prefix, layer and parameter.
LAYER = re.compile(r"(|.*\.)((?:features|classifier)\.\d+\.(?:(?:conv|bn)\.)?\w+|classifier\.(?:weight|bias))")
MODELZOO = {"classifier.0.": "fc1.", "classifier.3.": "fc2.", "classifier.6.": "fc3."}
# What lies beside a network and does not change its output.
HARMLESS = re.compile(r"(?<![^._])(?:loss|losses|criterion|metrics?|acc|accuracy|optim|optimizer|n_averaged)(?![a-z])")


def to_torchvision_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict under torchvision's names, or a copy as it is if it does not hold exactly one RGB VGG.

    Accepts the names above behind any prefix, mmpretrain's, and linear layers stored as convolutions. Entries that are
    not the network's keep their names, so that describe_mismatch reports them.
    """
    networks = _networks(state_dict)
    found = {prefix: weights for prefix, weights in networks.items() if len(networks) == 1 or architecture_of(weights)}
    weights, *copies = found.values() or [{}]  # copies: torch.compile's result beside the network itself
    is_one = all(_equal(weights, copy) for copy in copies)
    rest = {name: state_dict[name] for name in state_dict if _split(name)[0] not in found and not HARMLESS.search(name)}
    if not weights or not is_one or weights.keys() & rest.keys() or _bgr_layer(state_dict):
        return OrderedDict(state_dict)
    return OrderedDict({**weights, **rest})


def to_modelzoo_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict, under torchvision's names, as ModelZoo's VGG16 saves it on several devices."""
    return {f"module.{MODELZOO.get(name[:13], name[:13])}{name[13:]}": value for name, value in state_dict.items()}


def _equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def _networks(state_dict: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return {prefix: weights under torchvision's names} of all that may be VGGs."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        prefix, layer = _split(name)
        if prefix is not None:
            is_linear = layer.startswith("classifier.") and tensor.dim() == 4
            networks.setdefault(prefix, {})[layer] = tensor.flatten(1) if is_linear else tensor
    return {prefix: _number_layers(weights) for prefix, weights in networks.items()}


def _split(name: str) -> tuple[str | None, str]:
    """Return the prefix and torchvision's name of a parameter, (None, name) if it cannot be a VGG's."""
    plain = WRAPPER.sub("", name)
    for pattern, layer in RENAMED:
        plain = pattern.sub(layer, plain)
    match = LAYER.fullmatch(plain)
    return (match.group(1), match.group(2)) if match else (None, name)


def _number_layers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Number layers where mmpretrain numbers blocks: features.2.conv and .bn are features.4 and .5 of a vgg11_bn."""
    blocks = sorted(int(name.split(".")[1]) for name in weights if name.endswith(".conv.weight"))
    suffix = "_bn" if any(".bn." in name for name in weights) else ""
    arch = next((name + suffix for name in DEPTHS if blocks == _convolutions(name, layers=1)), None)
    if arch is None:
        return weights
    numbers = dict(zip(blocks, _convolutions(arch)))

    def layer(match: Match[str]) -> str:
        return f"features.{numbers[int(match.group(1))] + (match.group(2) == 'bn')}."

    return {re.sub(r"features\.(\d+)\.(conv|bn)\.", layer, name): tensor for name, tensor in weights.items()}


def _convolutions(arch: str, layers: int | None = None) -> list[int]:
    """Return the numbers of the convolutions in `features`. layers: how many numbers each convolution takes."""
    layers = layers or (3 if arch.endswith("_bn") else 2)
    pools_before = [stage for stage, depth in enumerate(DEPTHS[arch.replace("_bn", "")]) for _ in range(depth)]
    return [position * layers + pools for position, pools in enumerate(pools_before)]


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return the architecture of a state dict under torchvision's names, None if it is not that of a whole VGG."""
    if head_of(state_dict) is None:
        return None
    kernels = _kernels(state_dict)
    return next((arch for arch in ARCHITECTURES if kernels == dict.fromkeys(_convolutions(arch), (3, 3))), None)


def head_of(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return the head of a state dict under torchvision's names, None if it is neither."""
    return next((head for head in HEADS if all(f"{layer}.weight" in state_dict for layer in HEADS[head])), None)


def last_layer(state_dict: dict[str, torch.Tensor]) -> str:
    """Return the name of the layer whose outputs are the classes."""
    return HEADS[head_of(state_dict) or "paper"][-1]


def _kernels(weights: dict[str, torch.Tensor]) -> dict[int, tuple[int, ...]]:
    """Return {number of a convolution: its kernel's size}."""
    layers = {int(name.split(".")[1]): name for name in weights if re.fullmatch(r"features\.\d+\.weight", name)}
    return {number: tuple(weights[name].shape[2:]) for number, name in layers.items() if weights[name].dim() == 4}


def describe_weights(state_dict: dict[str, torch.Tensor]) -> str:
    """Say what a state dict holds that has no architecture under the names of to_torchvision_names."""
    layer, networks = _bgr_layer(state_dict), _networks(state_dict)
    if layer:
        return f"a network for BGR images from 0 to 255, as Caffe's are ({layer}): it would see other colors here"
    vggs = [prefix for prefix, weights in networks.items() if architecture_of(weights)]
    if len(vggs) > 1:
        return f"{len(vggs)} different VGGs ({', '.join(repr(prefix) for prefix in vggs)}): keep the weights of one"
    if vggs:
        beside = [name for name in state_dict if _split(name)[0] not in vggs]
        return f"a VGG ({vggs[0]!r}) and layers beside it ({', '.join(beside[:3])})"
    unknown = [name for name in state_dict if _split(name)[0] is None] or list(state_dict)
    for weights in networks.values():
        kernels = _kernels(weights)
        for arch in ARCHITECTURES:
            if sorted(kernels) == _convolutions(arch):
                if (1, 1) in kernels.values():
                    return "a VGG of configuration C (1×1 convolutions), which is not supported"
                return f"the convolutions of a {arch} without its linear layers ({', '.join(unknown[:3])})"
    return f"weights, but not those of a VGG ({', '.join(unknown[:3])})"


def _bgr_layer(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Return a name in weights of Caffe's models, whose input is BGR from 0 to 255, less the mean."""
    names = r"conv_?\d_\d"
    if any(name.endswith("classifier.6.weight") and len(tensor) == 1000 for name, tensor in state_dict.items()):
        names += r"|classifier\.1"  # torchvision before 0.1.8: its weights for ImageNet were Caffe's
    return next((name for name in state_dict if re.search(rf"(?<![^.])(?:{names})\.weight$", name)), None)


def network_of(state_dict: dict[str, torch.Tensor]) -> VGG | None:
    """Return a VGG of the shape of a state dict under torchvision's names, not loaded; None if it is not a VGG's."""
    arch, head = architecture_of(state_dict), head_of(state_dict)
    if arch is None or head is None:
        return None
    channels = [len(state_dict[f"features.{number}.weight"]) for number in _convolutions(arch)]
    widths = [channels[end - 1] for end in accumulate(DEPTHS[arch.replace("_bn", "")])]
    hidden, classes = (len(state_dict[f"{HEADS[head][layer]}.weight"]) for layer in (0, -1))
    return VGG(arch, classes, widths, hidden, head)


def describe_mismatch(state_dict: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    """Name the first parameter by which a state dict does not fit the model; None if it fits."""
    expected = model.state_dict()
    unknown = ", ".join([name for name in state_dict if name not in expected][:3])
    for name in [*expected, *state_dict]:
        if name not in state_dict:
            # Weights older than torch 0.4.1 lack batch norm's counter, which a fixed momentum does not use.
            if name.endswith("num_batches_tracked"):
                continue
            return f"{name} is missing" + (f" (unknown: {unknown})" if unknown else "")
        if name not in expected:
            return f"{name} does not exist in this architecture"
        if state_dict[name].shape != expected[name].shape:
            return f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(state_dict[name].shape)}"
    return None
