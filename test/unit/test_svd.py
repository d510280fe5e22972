# SPDX-License-Identifier: BSD-3-Clause
"""The truncated SVD of fc6 and fc7."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.svd import factorize
from engine.errors import UsageError

from helpers.small import small_vgg

import numpy as np
import pytest
import torch

FC6, FC7 = 0, 3


def weight_of(layer: Any) -> np.ndarray:
    """The matrix that one or two layers multiply by."""
    weights = [part.weight.detach().double().numpy() for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    return weights[0] if len(weights) == 1 else weights[1] @ weights[0]


def spectrum(position: int, network: Any) -> np.ndarray:
    return np.linalg.svd(weight_of(network.classifier[position]), compute_uv=False)


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return small_vgg("vgg11", 5).eval()


@pytest.mark.parametrize("rank", [1, 2, 5, 10, 15])
def test_no_matrix_of_this_rank_is_nearer(network: Any, rank: int) -> None:
    """Eckart and Young: the squared distance is the sum of the squared singular values that are left out."""
    classifier = factorize(network, [rank, rank])
    for position in (FC6, FC7):
        first, second = classifier[position]
        assert (first.out_features, second.in_features, first.bias) == (rank, rank, None)
        assert torch.equal(second.bias, network.classifier[position].bias)
        distance = np.linalg.norm(weight_of(network.classifier[position]) - weight_of(classifier[position]))
        assert distance == pytest.approx(np.linalg.norm(spectrum(position, network)[rank:]), rel=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7])
def test_a_share_of_the_energy_takes_the_least_rank_that_holds_it(network: Any, share: float, capsys: Any) -> None:
    classifier = factorize(network, [share, 0.1])
    rank, energy = classifier[FC6][0].out_features, spectrum(FC6, network) ** 2
    assert energy[:rank].sum() >= share * energy.sum() > energy[: rank - 1].sum()
    assert f"=> fc6: the first {rank} of 32 singular values hold {energy[:rank].sum() / energy.sum():.2%}" in (
        capsys.readouterr().out
    )


def test_what_would_not_be_smaller_stays_as_it_is(network: Any, capsys: Any) -> None:
    """fc7 is 32×32: two layers are smaller below rank 16. fc6 is 784×32: below 784·32 / 816 = 30.7."""
    classifier = factorize(network, [30, 16])
    assert len(classifier[FC6]) == 2 and classifier[FC7] is network.classifier[FC7]
    assert "fc7: the first 16 of 32" in capsys.readouterr().out.splitlines()[1]
    same = factorize(network, [31, 0.9999])
    assert same[FC6] is network.classifier[FC6] and same[FC7] is network.classifier[FC7]


def test_the_network_itself_is_not_changed(network: Any) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        factorize(network, [2, 2])
        assert torch.equal(network(images), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(network: Any, value: float) -> None:
    network.classifier[FC7].weight.data[3, 4] = value
    with pytest.raises(UsageError, match="fc7 are not finite"):
        factorize(network, [2, 2])


def test_zeros_have_a_rank_too(network: Any) -> None:
    torch.nn.init.zeros_(network.classifier[FC7].weight)
    assert factorize(network, [2, 0.5])[FC7] is not None


def test_what_cannot_be_factorized_is_refused(network: Any) -> None:
    with pytest.raises(UsageError, match="fc7 has 32 singular values, got 33"):
        factorize(network, [2, 33])
    with pytest.raises(UsageError, match="--head linear"):
        factorize(small_vgg("vgg11", 5, "linear"), [2, 2])
