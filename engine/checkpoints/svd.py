# SPDX-License-Identifier: BSD-3-Clause
"""Trained linear layers in fewer parameters: the truncated SVD of Fast R-CNN (arXiv:1504.08083, section 3.1)."""

from __future__ import annotations

from typing import Any, Sequence

from engine import console
from engine.errors import UsageError

import vgg

import numpy as np
import torch
from torch import nn


def factorize(network: vgg.VGG, ranks: Sequence[float]) -> nn.Sequential:
    """Return the classifier with two smaller layers each for fc6 and fc7, unless they would be larger.

    W ≈ U (Uᵀ W), where U are the first left singular vectors of W, which are the eigenvectors of W Wᵀ: that takes less
    time than the SVD. ranks: how many of them, or, below 1, the share of the energy (the sum of the squared singular
    values) that they must hold. Raises UsageError.
    """
    if network.head != "paper":
        raise UsageError("--svd-rank: a network with --head linear has no fc6 and fc7: leave it out")
    layers: Any = nn.Sequential(*network.classifier)  # type: ignore[misc]
    for name, position, rank in zip(("fc6", "fc7"), (0, 3), ranks):
        layer = layers[position]
        weight, size = layer.weight.detach(), min(layer.weight.shape)
        if rank > size:
            raise UsageError(f"--svd-rank: {name} has {size} singular values, got {rank}")
        if not torch.isfinite(weight).all():
            raise UsageError(f"--svd-rank: the weights of {name} are not finite")
        values, vectors = np.linalg.eigh((weight @ weight.t()).double().numpy())  # ascending
        energy = values[::-1].clip(0).cumsum()
        energy /= max(energy[-1], np.finfo(float).tiny)
        kept = int(rank) if rank >= 1 else min(int(np.searchsorted(energy, rank)) + 1, size)
        what = f"=> {name}: the first {kept} of {size} singular values hold {energy[kept - 1]:.2%} of the energy"
        if kept * sum(weight.shape) >= weight.numel():
            console.line(f"{what}; two layers of this rank are no smaller: it stays as it is")
            continue
        left = torch.from_numpy(vectors[:, : -kept - 1 : -1].copy()).float()
        pair = nn.Linear(layer.in_features, kept, bias=False), nn.Linear(kept, layer.out_features)
        pair[0].weight.data, pair[1].weight.data, pair[1].bias.data = left.t() @ weight, left, layer.bias.detach()
        layers[position] = nn.Sequential(*pair)
        console.line(what)
    return layers.requires_grad_(False)
