# SPDX-License-Identifier: BSD-3-Clause
"""Which image comes when, and batches on their way to the training loop.

The order depends only on (seed, epoch), so a run can resume anywhere, on any number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
import warnings
from typing import Any, Iterator, List, Sequence, Tuple, Union

from engine.data.augmentation import Augmentation
from engine.data.datasets import ImageDataset
from engine.errors import LoaderWorkerError, UserError, first_line
from engine.signals import ignore_stop_signals, sigterm_blocked

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the global order of an epoch: (count,) int64. NumPy has frozen MT19937 and its shuffle for good."""
    return np.random.RandomState([seed, epoch]).permutation(count)


def seed_augmentation(rng: np.random.RandomState, seed: int, epoch: int, index: int) -> np.random.RandomState:
    """Seed a generator for one image in one epoch: 7 µs, while making a new one takes 75."""
    rng.seed([seed, epoch, index])
    return rng


class ResumableBatchSampler:
    """The batches of one process, each as (epoch, indices).

    Training (`shuffle`): rank r takes its slice of each global batch, so the images of a step do not depend on the
    number of processes. An incomplete last batch is dropped. The stream continues over all epochs, so DataLoader
    workers never pause. Validation: every image once, in order; all ranks get the same number of batches, the last ones
    short or empty.

    Args:
        count: number of images in the dataset.
        local_batch: images per batch of this process.
        accum_steps: batches per optimizer step.
        start: (epoch, number of its images that an earlier run has used).
        with_previous: put the image that precedes the slice in its global batch in front (cyclically), for BatchMixer.
    """

    def __init__(
        self,
        count: int,
        local_batch: int,
        *,
        rank: int,
        world_size: int,
        shuffle: bool,
        accum_steps: int = 1,
        seed: int = 0,
        epochs: int = 1,
        start: tuple[int, int] = (0, 0),
        with_previous: bool = False,
    ) -> None:
        self.count, self.local_batch, self.rank, self.world_size = count, local_batch, rank, world_size
        self.shuffle, self.accum_steps, self.seed, self.epochs, self.start = shuffle, accum_steps, seed, epochs, start
        self.with_previous = with_previous
        self.global_batch = local_batch * world_size
        self.step_images = self.global_batch * accum_steps
        self.steps_per_epoch = self.steps_left(0)

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


# Of a batch, each image once per scale: [((n,) int64 positions in the batch, (n, H, W, 3) uint8)]
SizeGroups = List[Tuple[torch.Tensor, torch.Tensor]]

# (N, S, S, 3) uint8 images, or whole images by size; (N,) int64 targets, (N,) int64 indices into the dataset
Batch = Tuple[Any, torch.Tensor, torch.Tensor]
KEPT_BUFFERS = 3  # DataLoader asks a worker for batch n as it hands out n - 2, and n - 3 is on the device by then


class BatchDataset:
    """Whole batches of a dataset: `batches[epoch, indices]` is a Batch.

    Errors are returned in place of the batch, because DataLoader raises an exception again as text.

    Args:
        size: pixels per side.
        augmentation: of training images; None for validation images.
        scales: if given, batches hold whole images with each of these short sides (ViewAverage makes views of them).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        size: int,
        augmentation: Augmentation | None = None,
        scales: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.dataset, self.size, self.augmentation, self.scales, self.seed = dataset, size, augmentation, scales, seed
        self.rng = np.random.RandomState()
        self.buffers: list[torch.Tensor] = []

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch | UserError:
        epoch, indices = request
        try:
            images = self._whole_images(indices) if self.scales else self._images(epoch, indices)
            return images, share(torch.from_numpy(self.dataset.labels[indices])), share(torch.as_tensor(indices))
        except UserError as error:
            return error

    def _images(self, epoch: int, indices: np.ndarray) -> torch.Tensor:
        """Return (N, S, S, 3) uint8."""
        images = self._allocate(len(indices))
        for image, index in zip(images.numpy(), indices):
            if self.augmentation is None:
                image[...] = self.dataset.validation_image(index, self.size)
            else:
                rng = seed_augmentation(self.rng, self.seed, epoch, index)
                crop = self.dataset.training_image(index, self.size, rng, self.augmentation)
                image[...] = self.augmentation.vary(crop, rng)
        return images

    def _whole_images(self, indices: np.ndarray) -> SizeGroups:
        """Return each image at each scale, those of one size together."""
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for position, index in enumerate(indices):
            for scale in self.scales:
                image = self.dataset.whole_image(index, scale)
                groups.setdefault(image.shape, []).append((position, image))
        return [
            (
                share(torch.tensor([position for position, _ in group])),
                share(torch.from_numpy(np.stack([image for _, image in group]))),
            )
            for group in groups.values()
        ]

    def _allocate(self, count: int) -> torch.Tensor:
        """Return memory for `count` images; in a worker, shared memory that is used again for every third batch.

        New shared memory would cost a page fault every 4 KiB, an eighth of the loading time.
        """
        if get_worker_info() is None:
            return torch.empty(count, self.size, self.size, 3, dtype=torch.uint8)
        if len(self.buffers) == KEPT_BUFFERS and len(self.buffers[0]) >= count:
            self.buffers.append(self.buffers.pop(0))
        else:
            new = share(torch.empty(count, self.size, self.size, 3, dtype=torch.uint8))
            self.buffers = self.buffers[1 - KEPT_BUFFERS :] + [new]
        return self.buffers[-1][:count]


def share(tensor: torch.Tensor) -> torch.Tensor:
    """In a worker, move a tensor to shared memory. Raises LoaderWorkerError if there is none left.

    DataLoader would do it in a thread whose errors are lost: with /dev/shm full, the run would hang.
    """
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        raise worker_error(error) from error


def worker_error(error: Exception) -> LoaderWorkerError:
    return LoaderWorkerError(
        f"a DataLoader worker exited unexpectedly ({first_line(error)}): killed, out of memory, or "
        "/dev/shm is too small (docker run --shm-size=8g; --workers 0 needs none); the last checkpoint is intact"
    )


class BatchLoader:
    """Batches of a dataset in the order of a sampler; `iter` raises UserError for an image that cannot be read.

    options: of DataLoader, from ComputeDevice.loader_options.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: ResumableBatchSampler,
        size: int,
        *,
        augmentation: Augmentation | None = None,
        scales: Sequence[int] = (),
        seed: int = 0,
        options: dict[str, Any],
    ) -> None:
        self.sampler = sampler
        self.workers: list[Any] = []
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        self.loader: DataLoader = DataLoader(
            BatchDataset(dataset, size=size, augmentation=augmentation, scales=scales, seed=seed),  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,  # type: ignore[arg-type]
            collate_fn=unchanged,
            worker_init_fn=functools.partial(init_worker, os.getpid()),
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:
        before = multiprocessing.active_children()
        # Now, not at the first batch: this draws from the generator that dropout uses.
        with sigterm_blocked():  # in all threads of a worker, so that ignore_stop_signals sees who sends it
            batches = iter(self.loader)
        # With persistent workers, a second pass keeps those of the first.
        self.workers = [child for child in multiprocessing.active_children() if child not in before] or self.workers
        return _raise_errors(batches)

    def has_lost_a_worker(self) -> bool:
        return any(worker.exitcode not in (None, 0) for worker in self.workers)


def _raise_errors(batches: Iterator[Any]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def unchanged(batch: Any) -> Any:
    """A collate_fn for a dataset that gives whole batches."""
    return batch


def init_worker(parent: int, worker_id: int) -> None:
    """A worker_init_fn: the worker exits silently when its parent dies or terminates it."""
    ignore_stop_signals(parent)
    # Errors come back in place of a batch. Only a thread of multiprocessing could still print, if the parent is killed.
    sys.excepthook = lambda *_: None


class SyntheticLoader:
    """The same random batch, made on the device, as often as asked for: for measuring the step and nothing else."""

    def __init__(self, sampler: ResumableBatchSampler, size: int, device: torch.device) -> None:
        self.sampler = sampler
        count = sampler.local_batch + sampler.with_previous
        images = torch.randint(0, 256, (count, size, size, 3), device=device).byte()
        self.batch = images, torch.randint(0, 1000, (count,), device=device), torch.arange(count)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


Loader = Union[BatchLoader, SyntheticLoader]


@contextlib.contextmanager
def watch_workers(*loaders: Loader | None) -> Iterator[None]:
    """Turn the error that torch raises when a worker dies, at any point of the main thread, into LoaderWorkerError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises out of this signal, perhaps a second time
        deadline = time.monotonic() + 1  # a closed socket may be seen before the exit of the worker that closed it
        while time.monotonic() < deadline:
            if any(isinstance(loader, BatchLoader) and loader.has_lost_a_worker() for loader in loaders):
                raise worker_error(error) from error
            time.sleep(0.05)
        raise
