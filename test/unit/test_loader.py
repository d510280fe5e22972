# SPDX-License-Identifier: BSD-3-Clause
"""Batches from DataLoader workers: what is in them, and how the workers end."""

import contextlib
import os
import signal
import subprocess
import sys
import traceback

from engine.data.augmentation import Augmentation
from engine.data.datasets import ImageFolder
from engine.data.loader import BatchDataset, BatchLoader, ResumableBatchSampler, seed_augmentation, watch_workers
from engine.device.compute import ComputeDevice
from engine.errors import EXIT_FAILURE, ImageError, LoaderWorkerError
from helpers.program import environment, is_alive, run

import numpy as np
import pytest
import torch

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells workers that their parent has died")
SECONDS = 20  # for a process to exit


def root_of(dataset):
    return os.path.dirname(os.path.dirname(dataset.path(0)))


@pytest.fixture(scope="module")
def dataset(folder):
    return ImageFolder(os.path.join(folder, "train"))


def make_loader(dataset, local_batch, workers, *, training, seed=0, rank=0, world_size=1, shuffle=True, epochs=1):
    sampler = ResumableBatchSampler(
        len(dataset), local_batch, rank=rank, world_size=world_size, shuffle=shuffle, seed=seed, epochs=epochs
    )
    options = ComputeDevice("cpu").loader_options(workers)
    augmentation = Augmentation() if training else None
    return BatchLoader(dataset, sampler, 48, augmentation=augmentation, seed=seed, options=options)


def read(loader):
    """Copies of all batches: workers use a batch's memory again."""
    return [tuple(tensor.clone() for tensor in batch) for batch in loader]


# --- what is in a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_indices_are_those_of_the_images_in_the_dataset(dataset, workers, shuffle):
    seen = []
    for rank in range(2):
        loader = make_loader(dataset, 5, workers, training=False, rank=rank, world_size=2, shuffle=shuffle)
        batches = read(loader)
        assert [indices.tolist() for _, _, indices in batches] == [list(part) for _, part in loader.sampler]
        for images, targets, indices in batches:
            assert len(images) == len(targets) == len(indices)
            assert (images.dtype, targets.dtype, indices.dtype) == (torch.uint8, torch.int64, torch.int64)
            for image, target, index in zip(images.numpy(), targets.tolist(), indices.tolist()):
                assert np.array_equal(image, dataset.validation_image(index, 48)), index
                assert target == dataset.labels[index]
            seen += indices.tolist()
    assert len(seen) == len(set(seen)) == (20 if shuffle else 24)  # training drops the incomplete last batch


def test_training_images_are_augmented_by_seed_epoch_and_index(dataset):
    loader = make_loader(dataset, 12, 2, training=True, seed=3, epochs=2)
    for number, (images, _, indices) in enumerate(read(loader)):
        for image, index in zip(images.numpy(), indices.tolist()):
            rng = seed_augmentation(np.random.RandomState(), 3, number // 2, index)
            assert np.array_equal(image, dataset.training_image(index, 48, rng, Augmentation())), (number, index)


def test_pixels_do_not_depend_on_the_number_of_workers_or_on_the_batch_size(dataset):
    def pixels(workers, local_batch):
        batches = read(make_loader(dataset, local_batch, workers, training=True, seed=3, epochs=2))
        return [torch.cat(parts) for parts in zip(*batches)]

    expected = pixels(0, 12)
    for workers, local_batch in ((1, 12), (3, 4), (2, 1)):
        for ours, theirs in zip(pixels(workers, local_batch), expected):
            assert torch.equal(ours, theirs), (workers, local_batch)
    index = expected[2][:1].numpy()
    (other, _, _) = BatchDataset(dataset, size=48, augmentation=Augmentation(), seed=4)[0, index]
    assert not torch.equal(other, expected[0][:1])


def test_a_second_pass_gives_the_same_batches(dataset):
    loader = make_loader(dataset, 5, 2, training=False, shuffle=False)
    first, second = read(loader), read(loader)
    assert len(first) == len(second) == 5
    for one, other in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_an_unreadable_image_is_an_error_that_names_it(tmp_path, workers, training):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"no image")
    dataset = ImageFolder(str(tmp_path))
    assert isinstance(
        BatchDataset(dataset, size=48, augmentation=Augmentation() if training else None)[0, np.array([0])], ImageError
    )
    with pytest.raises(ImageError, match="x.jpg.*--bad-images skip") as caught:
        read(make_loader(dataset, 1, workers, training=training))
    traceback.clear_frames(caught.tb)  # ends the workers now, not in some later garbage collection


# --- how workers end --------------------------------------------------------------------------------------------------

# Two workers, and an iterator that is still there when Python shuts down, as in any program.
START = """
import os, signal, sys
from engine.device.compute import ComputeDevice
from engine.data.augmentation import Augmentation
from engine.data.datasets import ImageFolder
from engine.console import run_script
from engine.data.loader import BatchLoader, watch_workers
from engine.data.loader import ResumableBatchSampler

dataset = ImageFolder(sys.argv[1])
sampler = ResumableBatchSampler(len(dataset), 2, rank=0, world_size=1, shuffle=True, epochs=100)
loader = BatchLoader(
    dataset, sampler, 48, augmentation=Augmentation(), options=ComputeDevice("cpu").loader_options(2)
)
batches = iter(loader)
for _ in range(3):
    next(batches)
"""
WAIT = """
print(*(worker.pid for worker in loader.workers), flush=True)
sys.stdin.readline()
for _ in range(20):  # more than the workers have made in advance
    next(batches)
print("done", flush=True)
"""
KILL = """
def main():
    with watch_workers(loader):
        os.kill(loader.workers[0].pid, signal.SIGKILL)
        for _ in batches:
            pass
    return 0

run_script(main)
"""


@contextlib.contextmanager
def program(dataset):
    """Yield (a process, its workers) once it waits for a line."""
    command = [sys.executable, "-c", START + WAIT, root_of(dataset)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=environment(), universal_newlines=True, **pipes)
    workers = []
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2 and all(is_alive(worker) for worker in workers)
        yield process, workers
    finally:
        for pid in [process.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def finish(process):
    """Let the program take its last batches. It and its workers, which hold the same pipes, must exit by themselves."""
    out, err = process.communicate("\n", timeout=SECONDS)
    assert (process.returncode, out) == (0, "done\n"), err
    assert "Traceback" not in err


def test_a_program_that_returns_while_workers_are_loading_exits_by_itself(dataset):
    with program(dataset) as (process, _):
        finish(process)


@on_linux
def test_workers_die_with_a_parent_that_is_killed(dataset):
    with program(dataset) as (process, _):
        process.kill()
        process.communicate(timeout=SECONDS)  # to the end of the pipes, which the workers hold too
        assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo: a worker cannot tell who sent a signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_signal_of_another_process_than_its_parent_does_not_end_a_worker(dataset, name):
    with program(dataset) as (process, workers):
        for worker in workers:
            os.kill(worker, getattr(signal, name))
        finish(process)


def test_a_worker_that_is_killed_is_an_error_of_one_line(dataset):
    result = run(sys.executable, "-c", START + KILL, root_of(dataset), timeout=60)
    assert result.code == EXIT_FAILURE, result.err
    assert "error: a DataLoader worker exited unexpectedly" in result.err
    assert "Traceback" not in result.err


@pytest.fixture
def sigchld():
    """Put torch's signal handler back, which watch_workers removes."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.usefixtures("sigchld")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_lost_worker_raises_is_an_error_of_one_line(dataset, monkeypatch, error):
    """How torch notices a dead worker depends on what it was waiting for: its exit, its socket or its pipe."""
    loader = make_loader(dataset, 2, 0, training=True)
    monkeypatch.setattr(loader, "has_lost_a_worker", lambda: True)
    with pytest.raises(LoaderWorkerError, match="a DataLoader worker exited unexpectedly"), watch_workers(None, loader):
        raise error


@pytest.mark.usefixtures("sigchld")
def test_other_errors_stay_what_they_are(dataset):
    loader = make_loader(dataset, 2, 0, training=True)
    with pytest.raises(RuntimeError, match="out of memory"), watch_workers(None, loader):
        raise RuntimeError("out of memory")
