# SPDX-License-Identifier: BSD-3-Clause
"""Mixing of batches, the same on any number of processes."""

from __future__ import annotations

from engine.data.loader import ResumableBatchSampler
from engine.data.mixing import BatchMixer
from engine.versions import TORCH

import pytest
import torch

needs_torchvision_v2 = pytest.mark.skipif(TORCH < (2, 1), reason="torchvision's MixUp and CutMix require torch 2.1")


@needs_torchvision_v2
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_do_not_depend_on_the_number_of_processes(mixup: float, cutmix: float) -> None:
    """Each process mixes its slice; the image before it is the last of the slice before."""
    mixer = BatchMixer(mixup, cutmix, 4, seed=3)
    images, labels = torch.rand(40, 3, 16, 16), torch.arange(40) % 4

    def mixed(world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ranks = []
        for rank in range(world_size):
            sampler = ResumableBatchSampler(
                40, 12 // world_size, rank=rank, world_size=world_size, shuffle=True, seed=3, with_previous=True
            )
            ranks.append([mixer(images[index], labels[index], 0, batch) for batch, (_, index) in enumerate(sampler)])
        return [tuple(torch.cat(parts) for parts in zip(*batch)) for batch in zip(*ranks)]  # type: ignore[misc]

    whole = mixed(1)
    assert len(whole) == 3 and whole[0][0].shape == (12, 3, 16, 16) and whole[0][1].shape == (12, 4)
    for split in (mixed(2), mixed(3)):
        for (first, first_target), (second, second_target) in zip(whole, split):
            assert torch.equal(first, second) and torch.equal(first_target, second_target)
    targets = torch.cat([target for _, target in whole])
    assert torch.allclose(targets.sum(1), torch.ones(36)) and ((targets > 0) & (targets < 1)).any()


@needs_torchvision_v2
def test_a_mixed_image_is_the_blend_that_its_target_says() -> None:
    images = torch.stack([torch.full((3, 8, 8), float(value)) for value in range(5)])
    mixed, target = BatchMixer(0.8, 0.0, 5, seed=1)(images, torch.arange(5), 2, 7)
    assert torch.allclose(mixed[:, 0, 0, 0], target @ torch.arange(5.0), atol=1e-6)
