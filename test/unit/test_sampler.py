# SPDX-License-Identifier: BSD-3-Clause
"""Which image comes when: the order of training images depends on the seed and the epoch alone."""

from types import SimpleNamespace

from engine.data.loader import ImageBatches, ResumableBatchSampler, permutation

import numpy as np
import pytest


def stream(world_size, local_batch, **options):
    """The (epoch, images) of each batch, over all processes, in order of rank."""
    options = {"shuffle": True, "seed": 7, "epochs": 2, **options}
    ranks = [
        list(ResumableBatchSampler(103, local_batch, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    return [(parts[0][0], [int(index) for _, part in parts for index in part]) for parts in zip(*ranks)]


def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes():
    assert stream(1, 12) == stream(2, 6) == stream(3, 4) == stream(4, 3)
    assert len(stream(1, 12)) == 2 * (103 // 12)


def test_an_epoch_uses_no_image_twice_and_epochs_differ():
    first = [index for epoch, part in stream(2, 6) for index in part if epoch == 0]
    second = [index for epoch, part in stream(2, 6) for index in part if epoch == 1]
    assert len(set(first)) == len(first) == 96
    assert first != second
    assert stream(2, 6) != stream(2, 6, seed=8)


def test_the_order_of_an_epoch_is_the_same_on_every_version_of_numpy():
    assert list(permutation(7, 0, 10)) == [0, 1, 5, 7, 6, 9, 4, 3, 2, 8]


def test_training_resumes_at_any_step():
    whole = stream(2, 6)
    for done in range(len(whole)):
        assert stream(2, 6, start=(done // 8, done % 8 * 12)) == whole[done:]


def test_training_continues_at_the_next_image_with_another_batch_size():
    """36 of 103 images used; then 6 steps of 11, and whole epochs again."""
    used = [index for _, part in stream(2, 6)[:3] for index in part]
    rest = stream(1, 11, start=(0, 36))
    first = [index for epoch, part in rest if epoch == 0 for index in part]
    assert used + first == list(permutation(7, 0, 103)[: 36 + 66])
    assert sum(epoch == 1 for epoch, _ in rest) == 103 // 11


def test_training_resumes_at_any_step_of_accumulated_batches():
    whole = stream(2, 2, accum_steps=3)
    for done in range(16):
        assert stream(2, 2, accum_steps=3, start=(done // 8, done % 8 * 12)) == whole[3 * done :]


def test_accumulated_batches_are_the_images_of_one_large_batch():
    small, large = stream(1, 4, accum_steps=3), stream(1, 12)
    assert [index for _, part in small for index in part] == [index for _, part in large for index in part]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_takes_every_image_once(world_size):
    for count in range(1, 41):
        samplers = [
            ResumableBatchSampler(count, 3, rank=rank, world_size=world_size, shuffle=False)
            for rank in range(world_size)
        ]
        ranks = [list(sampler) for sampler in samplers]
        assert sorted(int(index) for rank in ranks for _, part in rank for index in part) == list(range(count))
        assert {len(rank) for rank in ranks} == {samplers[0].steps_per_epoch}


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    class Draw:
        """A transform whose pixels are drawn."""

        image_size = 2

        def __call__(self, source, rng):
            return rng.randint(0, 256, (2, 2, 3))

    dataset = SimpleNamespace(labels=np.zeros(9, np.int64), read=lambda index: b"")

    def draw(seed, epoch, *indices):
        return ImageBatches(dataset, Draw(), seed=seed)[epoch, np.array(indices)][0][-1].tolist()

    first = draw(3, 1, 5)
    assert draw(3, 1, 7, 5) == first == np.random.RandomState([3, 1, 5]).randint(0, 256, (2, 2, 3)).tolist()
    assert all(draw(*key) != first for key in ((4, 1, 5), (3, 2, 5), (3, 1, 6)))
