# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation of single images, mixing of batches, and that both are the same however a run is started."""

from __future__ import annotations

from typing import Any

from engine.data import augmentation
from engine.data.augmentation import COLOR_COMPONENTS, COLOR_DEVIATIONS, Augmentation, BatchMixer, seeded, shift_colors
from engine.data.images import random_resized_crop, random_scale_box
from engine.data.loader import ResumableBatchSampler
from engine.errors import UsageError
from engine.versions import TORCH
from helpers.images import jpeg, photo
from helpers.program import TWO, assert_same_weights, run_main, weights

import numpy as np
import pytest
import torch

needs_torchvision_v2 = pytest.mark.skipif(TORCH < (2, 1), reason="torchvision's MixUp and CutMix require torch 2.1")
SMALL = ["--arch", "vgg11", "--image-size", "32"]


def generator(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


# --- the paper's ------------------------------------------------------------------------------------------------------


def test_scale_jitter_takes_a_crop_of_an_image_whose_short_side_was_resized() -> None:
    boxes = [random_scale_box(500, 375, 224, (256, 512), generator(seed)) for seed in range(2000)]
    sides = {right - left for left, _, right, _ in boxes} | {bottom - top for _, top, _, bottom in boxes}
    assert min(sides) == round(375 * 224 / 512) and max(sides) == round(375 * 224 / 256)
    assert all(0 <= left < right <= 500 and 0 <= top < bottom <= 375 for left, top, right, bottom in boxes)
    assert {right for _, _, right, _ in boxes} >= {500} and {left for left, _, _, _ in boxes} >= {0}
    assert {random_scale_box(375, 300, 224, (224, 224), generator(seed))[2:] for seed in range(9)} <= {
        (left + 300, 300) for left in range(76)
    }


def test_scale_jitter_is_what_resizing_and_cropping_gives() -> None:
    content = jpeg(600, 450, 3, quality=95)
    crop = random_resized_crop(content, 224, generator(5), Augmentation(train_scale=(300, 300), hflip=0))
    box = random_scale_box(600, 450, 224, (300, 300), generator(5))
    from PIL import Image

    left, top = round(box[0] * 300 / 450), round(box[1] * 300 / 450)
    resized = Image.fromarray(photo(600, 450, 3)).resize((400, 300), Image.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64)
    assert np.abs(crop - expected).mean() < 3


def test_colors_shift_by_one_color_along_the_principal_components() -> None:
    image = np.full((4, 4, 3), 128, np.uint8)
    shifts = np.array([shift_colors(image, generator(seed))[0, 0].astype(float) - 128 for seed in range(3000)])
    covariance = 255**2 * 0.01 * COLOR_COMPONENTS @ np.diag(COLOR_DEVIATIONS**2) @ COLOR_COMPONENTS.T
    assert np.allclose(np.cov(shifts.T), covariance, atol=0.1 * covariance.max())
    pale = photo(20, 20, 1) // 2 + 64
    shifted = shift_colors(pale, generator(0)).astype(int) - pale
    assert all(len(np.unique(shifted[..., channel])) == 1 for channel in range(3))  # nothing was clipped here
    white = [shift_colors(np.full((2, 2, 3), 255, np.uint8), generator(seed)) for seed in range(20)]
    assert np.max(white) == 255 and np.min(white) > 100  # clipped, not wrapped around


def test_hflip_is_a_probability() -> None:
    content = jpeg(64, 64, 2)
    crops = {hflip: [random_resized_crop(content, 32, generator(7), Augmentation(hflip=hflip))] for hflip in (0.0, 1.0)}
    assert np.array_equal(crops[0.0][0], crops[1.0][0][:, ::-1])


# --- torchvision's ----------------------------------------------------------------------------------------------------


@needs_torchvision_v2
@pytest.mark.parametrize(
    "options", [{"auto_augment": name} for name in ("ta_wide", "ra", "aa")] + [{"random_erasing": 1.0}]
)
def test_images_vary_with_their_generator_alone_and_torchs_generator_is_left_as_it_was(options: Any) -> None:
    augment, image = Augmentation(fill=(124, 116, 104), **options), photo(48, 48, 0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    varied = [augment.vary(image, generator(seed)) for seed in (1, 2, 3, 4, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(result.shape == (48, 48, 3) and result.dtype == np.uint8 for result in varied)
    assert np.array_equal(varied[0], varied[4])
    assert len({result.tobytes() for result in varied}) > 2
    if "auto_augment" in options:
        assert augment.transforms[0].interpolation.value == "bilinear"  # as in torchvision's references
    if "random_erasing" in options:
        erased = (varied[0] != image).any(2)
        assert 0.02 <= erased.mean() <= 0.33 and set(map(tuple, varied[0][erased].tolist())) == {(124, 116, 104)}


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


def test_seeded_draws_are_repeatable_and_leave_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(9):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(9):
        assert torch.equal(torch.rand(3), first)


# --- the command line -------------------------------------------------------------------------------------------------


ALL = ["--train-scale", 32, 64, "--hflip", 0.3, "--color-shift", "--no-bias-decay"]
ALL_OF_TORCHVISION = ["--auto-augment", "ta_wide", "--random-erasing", 0.5, "--mixup", 0.2, "--cutmix", 1.0]


@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_a_run_with_every_augmentation_continues_bit_for_bit(folder: str, tmp_path: Any, processes: list[str]) -> None:
    flags = [folder, *SMALL, "-b", 6, "--epochs", 2, *ALL, *(ALL_OF_TORCHVISION if TORCH >= (2, 1) else []), *processes]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run_main(*flags, "--output-dir", whole)
    assert result.code == 0, result.err
    assert ("images are mixed" in result.out) == (TORCH >= (2, 1))
    path = parts / "checkpoint.pth.tar"
    for stop, workers, resume in ((2, 0, []), (100, 2, ["--resume", path])):
        result = run_main(*flags, "--output-dir", parts, "--stop-step-num", stop, "-j", workers, *resume)
        assert result.code == 0, result.err
        if stop == 2 and not processes:
            other = run_main(folder, *SMALL, "-b", 6, "--epochs", 2, "--resume", path, "--output-dir", parts)
            assert other.code == 2 and "within an epoch with augmentation train_scale [32, 64]" in other.err, other.err
    assert_same_weights(weights(whole / "checkpoint.pth.tar"), weights(path))


def test_an_older_torch_is_refused_by_name(monkeypatch: Any) -> None:
    monkeypatch.setattr(augmentation, "TORCH", (1, 8))
    with pytest.raises(UsageError, match="--mixup requires torch 2.1 or later"):
        augmentation.require_torchvision("--mixup")


def test_flags_that_do_not_fit_the_data_are_one_line(folder: str, tmp_path: Any) -> None:
    for flags, message in (
        ([folder, "--train-scale", 16, 64], "--train-scale must be at least 32 and at most 4096, got 16"),
        ([folder, "--image-size", 64, "--train-scale", 48, 64], "at least the crop, --image-size 64, got 48"),
        (["--train-scale", 32, 64], "--train-scale are for folders of images: leave them out"),
    ):
        result = run_main(*flags, "-b", 6, "--output-dir", tmp_path)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
