# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation of training images: what each step does, and that it depends on the image's generator alone."""

from __future__ import annotations

from typing import Any

from engine.data.transforms import (
    COLOR_COMPONENTS,
    COLOR_DEVIATIONS,
    Augmentation,
    random_scale_box,
    seeded,
    shift_colors,
)
from engine.versions import TORCH

from helpers.images import jpeg, photo

import numpy as np
import pytest
import torch

needs_torchvision_v2 = pytest.mark.skipif(TORCH < (2, 1), reason="torchvision's MixUp and CutMix require torch 2.1")


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
    crop = Augmentation(224, train_scale=(300, 300), hflip=0)(content, generator(5))
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
    crops = {hflip: [Augmentation(32, hflip=hflip)(content, generator(7))] for hflip in (0.0, 1.0)}
    assert np.array_equal(crops[0.0][0], crops[1.0][0][:, ::-1])


# --- torchvision's ----------------------------------------------------------------------------------------------------


@needs_torchvision_v2
@pytest.mark.parametrize(
    "options", [{"auto_augment": name} for name in ("ta_wide", "ra", "aa")] + [{"random_erasing": 1.0}]
)
def test_images_vary_with_their_generator_alone_and_torchs_generator_is_left_as_it_was(options: Any) -> None:
    augmentation, image = Augmentation(48, fill=(124, 116, 104), **options), photo(48, 48, 0)
    (_, step) = augmentation.steps  # the first one crops
    torch.manual_seed(5)
    before = torch.get_rng_state()
    varied = [step(image, generator(seed)) for seed in (1, 2, 3, 4, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(result.shape == (48, 48, 3) and result.dtype == np.uint8 for result in varied)
    assert np.array_equal(varied[0], varied[4])
    assert len({result.tobytes() for result in varied}) > 2
    if "auto_augment" in options:
        assert step.args[0][0].interpolation.value == "bilinear"  # as in torchvision's references
    if "random_erasing" in options:
        erased = (varied[0] != image).any(2)
        assert 0.02 <= erased.mean() <= 0.33 and set(map(tuple, varied[0][erased].tolist())) == {(124, 116, 104)}


def test_seeded_draws_are_repeatable_and_leave_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(9):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(9):
        assert torch.equal(torch.rand(3), first)
