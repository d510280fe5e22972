# SPDX-License-Identifier: BSD-3-Clause
"""VGG-11, 13, 16 and 19, plain and with batch normalisation, and the names their weights go by elsewhere.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556, table 1.
"""
import re
from collections import OrderedDict

import torch
from torch import nn

# Convolutions in each of the five stages: columns A, B, D and E of the paper's table 1.
DEPTHS = {'vgg11': (1, 1, 2, 2, 2), 'vgg13': (2, 2, 2, 2, 2), 'vgg16': (2, 2, 3, 3, 3), 'vgg19': (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)  # output channels of each stage
ARCHITECTURES = sorted(DEPTHS) + sorted(name + '_bn' for name in DEPTHS)
LAST_LAYER = 'classifier.6'


class VGG(nn.Module):
    """Images to logits.

    Layer numbers, and so parameter names, are torchvision's. ReLU stands behind each max-pool where torchvision has it
    before: the two commute exactly, and the ReLU then touches a quarter of the memory.
    """

    def __init__(self, arch='vgg16', num_classes=1000):
        super().__init__()
        self.features = _features(DEPTHS[arch.replace('_bn', '')], batch_norm=arch.endswith('_bn'))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, num_classes))
        self.apply(_initialise)

    def forward(self, images):
        """images: (N, 3, H, W) floating point, normalised, H and W at least 32. Returns logits (N, num_classes)."""
        return self.classify(self.features(images))

    def classify(self, maps):
        """maps: (N, 512, h, w), of the features. Returns logits (N, num_classes)."""
        maps = _average_pool_7x7(maps)
        # (C, H, W) order whatever the memory format: the weights of classifier.0 expect it.
        return self.classifier(torch.flatten(maps.contiguous(), 1))


def _features(depths, batch_norm):
    layers, channels = [], 3
    for depth, width in zip(depths, WIDTHS):
        for position in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            if position == depth - 1:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            layers.append(nn.ReLU(inplace=True))
            channels = width
    return nn.Sequential(*layers)


def _average_pool_7x7(maps):
    """Average (N, C, H, W) to (N, C, 7, 7). At 224 pixels the maps are 7×7 already, at 32 they are single points."""
    size = tuple(maps.shape[-2:])
    if size == (7, 7):
        return maps
    if size == (1, 1):
        return maps.expand(-1, -1, 7, 7)
    # The values of F.adaptive_avg_pool2d, by means whose backward pass is deterministic on a GPU too.
    for dimension, length in ((2, size[0]), (3, size[1])):
        maps = torch.stack([maps.narrow(dimension, length * i // 7, -(-length * (i + 1) // 7) - length * i // 7).mean(dimension)
                            for i in range(7)], dimension)
    return maps


def _initialise(layer):
    """As the reference (ModelZoo's VGG16, after torchvision's vgg.py): Kaiming fan-out, linear layers N(0, 0.01)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01)
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.zeros_(layer.bias)


def rename(state_dict):
    """Bring the names of a state_dict to torchvision's.

    Knows torchvision's own names, the reference's (`fc1 fc2 fc3` for `classifier.0 .3 .6`), and either behind the
    `module.` that DistributedDataParallel puts in front. Tensors are passed on untouched.
    """
    numbers = {'fc1': 'classifier.0', 'fc2': 'classifier.3', 'fc3': 'classifier.6'}

    def torchvision_name(name):
        name = re.sub(r'^(module\.)+', '', name)
        head, _, tail = name.partition('.')
        return numbers.get(head, head) + '.' + tail

    return OrderedDict((torchvision_name(name), tensor) for name, tensor in state_dict.items())


def architecture(state_dict):
    """The architecture that a renamed state_dict is of, by its number of convolutions; None where it is no VGG's."""
    convolutions = sum(tensor.dim() == 4 for tensor in state_dict.values())
    batch_norm = any(name.endswith('running_mean') for name in state_dict)
    for name, depths in DEPTHS.items():
        if sum(depths) == convolutions:
            return name + '_bn' * batch_norm
    return None


def mismatch(state_dict, model):
    """Say how a renamed state_dict fails to fit the model, by its first parameter that differs; None where it fits."""
    expected = model.state_dict()
    for name in list(expected) + list(state_dict):
        if name not in state_dict:
            # Batch norm's counter is absent from weights older than torch 0.4.1 and plays no part with a fixed momentum.
            if name.endswith('num_batches_tracked'):
                continue
            return '{} is missing'.format(name)
        if name not in expected:
            return '{} has no place in this architecture'.format(name)
        if state_dict[name].shape != expected[name].shape:
            return '{} is {}, here {}'.format(name, tuple(state_dict[name].shape), tuple(expected[name].shape))
    return None
