# SPDX-License-Identifier: BSD-3-Clause
"""Which image comes when, and whole batches of images.

The order depends only on (seed, epoch), so a run can resume anywhere, on any number of processes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence, Tuple

from engine.data.datasets import FileList, ImageDataset, image_error
from engine.data.decoding import UnreadableError, unreadable
from engine.data.transforms import Augmentation, Preprocessing, whole_image
from engine.data.workers import NO_DESCRIPTOR, WholeImages, in_worker, share, worker_error
from engine.errors import ImageError, UsageError, UserError, counted

import numpy as np
import torch


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the global order of an epoch: (count,) int64. NumPy has frozen MT19937 and its shuffle for good."""
    return np.random.RandomState([seed, epoch]).permutation(count)


@dataclass
class ResumableBatchSampler:
    """The batches of one process, each as (epoch, indices).

    Training (`shuffle`): rank r takes its slice of each global batch, so the images of a step do not depend on the
    number of processes. An incomplete last batch is dropped. The stream continues over all epochs, so DataLoader
    workers never pause. Validation: every image once, in order; all ranks get the same number of batches, the last ones
    short or empty.

    Raises:
        UsageError: an epoch has no step.
    """

    count: int  # images of the dataset
    local_batch: int  # images per batch of this process
    rank: int
    world_size: int
    shuffle: bool
    accum_steps: int = 1  # batches per optimizer step
    seed: int = 0
    epochs: int = 1
    start: tuple[int, int] = (0, 0)  # epoch, and the number of its images that an earlier run has used
    with_previous: bool = False  # put the image that precedes the slice in its global batch in front, for BatchMixer

    def __post_init__(self) -> None:
        self.global_batch = self.local_batch * self.world_size
        self.step_images = self.global_batch * self.accum_steps
        self.steps_per_epoch = self.steps_left(0)
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"a step takes {counted(self.step_images, 'image')}, and there are only {self.count}: use a smaller "
                "--batch-size or --val-split"
            )

    def steps_left(self, images_done: int) -> int:
        """Return the optimizer steps that are left of an epoch of which an earlier run has used some images."""
        left = self.count - images_done
        return left // self.step_images if self.shuffle else -(-left // self.step_images)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch, done = self.start
        while epoch < self.epochs:
            order = permutation(self.seed, epoch, self.count) if self.shuffle else np.arange(self.count)
            for batch in range(self.steps_left(done) * self.accum_steps):
                first = done + (batch * self.world_size + self.rank) * self.local_batch
                indices = order[first : first + self.local_batch]
                if self.with_previous:
                    previous = first - 1 if self.rank else first - 1 + self.global_batch
                    indices = np.concatenate([order[previous : previous + 1], indices])
                yield epoch, indices
            epoch, done = epoch + 1, 0


# --- batches ----------------------------------------------------------------------------------------------------------

# (N, S, S, 3) uint8 images, or WholeImages, which read_batches groups by size; (N,) int64 targets, (N,) int64 indices
# into the dataset
Batch = Tuple[Any, torch.Tensor, torch.Tensor]
KEPT_BUFFERS = 3  # DataLoader asks a worker for batch n as it hands out n - 2, and n - 3 is on the device by then


@dataclass
class ImageBatches:
    """Whole batches of a dataset: `batches[epoch, indices]` is a Batch.

    Errors are returned in place of the batch, because DataLoader raises an exception again as text.
    """

    dataset: ImageDataset | FileList
    transform: Augmentation | Preprocessing
    seed: int = 0
    scales: Sequence[int] = ()  # if given, batches hold whole images with each of these short sides, for ViewAverage
    leave_out: bool = False  # images that cannot be read are not in the batch; their errors are its fourth part

    def __post_init__(self) -> None:
        self.rng = np.random.RandomState()
        self.buffers: list[torch.Tensor] = []

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch | tuple[Any, ...] | UserError:
        epoch, indices = request
        errors: list[ImageError] = []
        try:
            if self.scales:
                images: Any = self._whole_images(indices)
            else:
                images, indices = self._images(epoch, indices, errors)
            batch = images, share(torch.from_numpy(self.dataset.labels[indices])), share(torch.as_tensor(indices))
        except UserError as error:
            return error
        return (*batch, errors) if self.leave_out else batch

    def _images(self, epoch: int, indices: np.ndarray, errors: list[ImageError]) -> tuple[torch.Tensor, np.ndarray]:
        """Return (N, S, S, 3) uint8 and the indices of the images; `leave_out` adds to the errors."""
        kept: list[int] = []
        images = self._allocate(len(indices))
        pixels = images.numpy()
        for index in indices:
            self.rng.seed([self.seed, epoch, index])  # 7 µs; a new generator for each image would take 75
            try:
                pixels[len(kept)] = self._read(index, lambda source: self.transform(source, self.rng))
            except ImageError as error:
                if not self.leave_out:
                    raise
                errors.append(error)
            else:
                kept.append(index)
        return images[: len(kept)], np.array(kept, np.int64)

    def _whole_images(self, indices: np.ndarray) -> WholeImages:
        """Return each image at each scale, those of one size together."""
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for position, index in enumerate(indices):
            for scale in self.scales:
                transform = functools.partial(whole_image, scale=scale, exif_rotate=self.transform.exif_rotate)
                image = self._read(index, transform)
                groups.setdefault(image.shape, []).append((position, image))
        images = list(itertools.chain.from_iterable(groups.values()))
        pixels = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for _, image in images)])
        layout = np.array([(position, *image.shape[:2]) for position, image in images], np.int64)
        return WholeImages(share(torch.from_numpy(pixels)), share(torch.from_numpy(layout)))

    def _read(self, index: int, transform: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Read an image and transform it. Raises ImageError, which names it, if it cannot be read or decoded."""
        try:
            with unreadable():
                source = self.dataset.read(index)
            return transform(source)
        except UnreadableError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in NO_DESCRIPTOR:
                raise worker_error(cause) from error
            raise image_error(self.dataset, index, error) from error

    def _allocate(self, count: int) -> torch.Tensor:
        """Return memory for `count` images; in a worker, shared memory that is used again for every third batch.

        New shared memory would cost a page fault every 4 KiB, an eighth of the loading time.
        """
        size = self.transform.image_size
        if in_worker() and len(self.buffers) == KEPT_BUFFERS and len(self.buffers[0]) >= count:
            self.buffers.append(self.buffers.pop(0))
            return self.buffers[-1][:count]
        new = share(torch.empty(count, size, size, 3, dtype=torch.uint8))
        if in_worker():
            self.buffers = self.buffers[1 - KEPT_BUFFERS :] + [new]
        return new
