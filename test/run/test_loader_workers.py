# SPDX-License-Identifier: BSD-3-Clause
"""Batches from DataLoader workers: what is in them, and how the workers end."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys

from engine.data import Augmentation, ImageBatches, Preprocessing, ResumableBatchSampler, read_batches, worker_options
from engine.data.datasets import ImageFolder
from engine.data.folder_index import open_index
from engine.errors import EXIT_FAILURE, ImageError

import vgg
from helpers.images import jpeg
from helpers.program import SMALL_MAIN, environment, is_alive, run

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells workers that their parent has died")
SECONDS = 20  # for a process to exit


def root_of(dataset):
    return os.path.dirname(os.path.dirname(dataset.name(0)))


@pytest.fixture(scope="module")
def dataset(folder):
    return ImageFolder(open_index(os.path.join(folder, "train")))


def make_loader(dataset, local_batch, workers, *, training, seed=0, rank=0, world_size=1, shuffle=True, epochs=1):
    sampler = ResumableBatchSampler(
        len(dataset), local_batch, rank=rank, world_size=world_size, shuffle=shuffle, seed=seed, epochs=epochs
    )
    batches = ImageBatches(dataset, Augmentation(48) if training else Preprocessing(48), seed=seed)
    return DataLoader(batches, batch_size=None, sampler=sampler, **worker_options(workers))


def read(loader):
    """Copies of all batches: workers use a batch's memory again."""
    return [tuple(tensor.clone() for tensor in batch) for batch in read_batches(loader)]


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
                assert np.array_equal(image, Preprocessing(48)(dataset.read(index))), index
                assert target == dataset.labels[index]
            seen += indices.tolist()
    assert len(seen) == len(set(seen)) == (20 if shuffle else 24)  # training drops the incomplete last batch


def test_training_images_are_augmented_by_seed_epoch_and_index(dataset):
    loader = make_loader(dataset, 12, 2, training=True, seed=3, epochs=2)
    for number, (images, _, indices) in enumerate(read(loader)):
        for image, index in zip(images.numpy(), indices.tolist()):
            rng = np.random.RandomState([3, number // 2, index])
            assert np.array_equal(image, Augmentation(48)(dataset.read(index), rng)), (number, index)


def test_pixels_do_not_depend_on_the_number_of_workers_or_on_the_batch_size(dataset):
    def pixels(workers, local_batch):
        batches = read(make_loader(dataset, local_batch, workers, training=True, seed=3, epochs=2))
        return [torch.cat(parts) for parts in zip(*batches)]

    expected = pixels(0, 12)
    for workers, local_batch in ((1, 12), (3, 4), (2, 1)):
        for ours, theirs in zip(pixels(workers, local_batch), expected):
            assert torch.equal(ours, theirs), (workers, local_batch)
    index = expected[2][:1].numpy()
    (other, _, _) = ImageBatches(dataset, Augmentation(48), seed=4)[0, index]
    assert not torch.equal(other, expected[0][:1])


def test_a_second_pass_gives_the_same_batches(dataset):
    loader = make_loader(dataset, 5, 2, training=False, shuffle=False)
    first, second = read(loader), read(loader)
    assert len(first) == len(second) == 5
    for one, other in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("workers, good", [(0, 0), (0, 5), (1, 5), (2, 0), (3, 20)])  # images before it
@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_an_unreadable_image_is_an_error_that_names_it(tmp_path, workers, good, training):
    (tmp_path / "a").mkdir()
    for number in range(good):
        (tmp_path / "a" / f"{number:02d}.jpg").write_bytes(jpeg(60, 50, number))
    (tmp_path / "a" / "x.jpg").write_bytes(b"no image")
    dataset = ImageFolder(open_index(str(tmp_path)))
    try:
        read(make_loader(dataset, 1, workers, training=training, shuffle=False))
    except ImageError as error:
        assert re.search("x.jpg.*--bad-images skip", str(error))
    else:
        raise AssertionError("read")
    # With the error its frames are gone, and the workers with them: no garbage collection has to find them.
    assert multiprocessing.active_children() == []


# --- how workers end --------------------------------------------------------------------------------------------------

# Two workers, and an iterator that is still there when Python shuts down, as in any program.
START = """
import multiprocessing, os, signal, sys
from engine.console import run_script
from engine.data import *
from torch.utils.data import DataLoader

dataset = FileList.find([sys.argv[1]])
sampler = ResumableBatchSampler(len(dataset), 2, rank=0, world_size=1, shuffle=True, epochs=100)
loader = DataLoader(ImageBatches(dataset, Augmentation(48)), batch_size=None, sampler=sampler, **worker_options(2))
batches = read_batches(loader)
workers = multiprocessing.active_children()
"""
WAIT = """
for _ in range(3):
    next(batches)
print(*(worker.pid for worker in workers), flush=True)
sys.stdin.readline()
for _ in range(20):  # more than the workers have made in advance
    next(batches)
print("done", flush=True)
"""
READ = """
def main():
    for number, _ in enumerate(batches):
        if number == int(sys.argv[2]):
            os.kill(workers[0].pid, signal.SIGKILL)
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
    result = run(sys.executable, "-c", START + READ, root_of(dataset), 3, timeout=60)
    assert result.code == EXIT_FAILURE, result.err
    assert "error: a DataLoader worker exited unexpectedly" in result.err
    assert "Traceback" not in result.err


@on_linux
def test_a_worker_that_cannot_send_a_batch_does_not_hang_the_run(dataset):
    """A thread of multiprocessing sends it, by a socket; its errors would be lost."""
    remove = "import shutil\nshutil.rmtree(multiprocessing.util.get_temp_dir())\n"
    code = START.replace("batches = read", f"{remove}batches = read") + READ
    result = run(sys.executable, "-c", code, root_of(dataset), -1, timeout=60)
    assert result.code == EXIT_FAILURE and "error: a DataLoader worker exited unexpectedly" in result.err, result.err


@pytest.mark.parametrize("length", [40, 76, 100, 200, "missing"])
def test_workers_send_batches_whatever_tmpdir_is(dataset, tmp_path, length):
    """The path of a socket has at most 107 bytes."""
    folder = tmp_path / "".ljust(length - len(str(tmp_path)) - 1 if length != "missing" else 9, "x")[:200]
    if length != "missing":
        folder.mkdir(exist_ok=True)
    result = run(sys.executable, "-c", START + READ, root_of(dataset), -1, env={"TMPDIR": str(folder)}, timeout=120)
    assert result.code == 0, result.err
    if folder.exists():
        assert not [name for name in os.listdir(folder) if name.startswith("pymp-")]


def run_with_descriptors(limit, *flags):
    """Run main.py under `ulimit -n`, on the digits if no data is given."""
    command = ["bash", "-c", f'ulimit -{limit} && exec "$@"', "bash", sys.executable, SMALL_MAIN, "--device", "cpu"]
    return run(*command, "--arch", "vgg11", "--stop-step-num", "3", *flags, timeout=60)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("descriptors", [20, 24, 28, 32])
def test_too_few_descriptors_are_one_line_that_names_ulimit(tmp_path, workers, descriptors):
    result = run_with_descriptors(f"n {descriptors}", "-j", workers, "--output-dir", tmp_path)
    assert result.code in (0, 1) and "Traceback" not in result.err, result.err
    assert result.code == 0 or "ulimit -n" in result.err.splitlines()[-1], result.err
    assert result.code == 1 or descriptors > 24 or workers == 1


def test_the_soft_limit_of_descriptors_is_raised(tmp_path):
    result = run_with_descriptors("Sn 24", "-j", 4, "--output-dir", tmp_path)
    assert result.code == 0, result.err


def test_an_evaluation_of_many_sizes_needs_few_descriptors(tmp_path):
    """Of 60 images, each of another size, at three scales: a tensor per size would need 180 descriptors per batch."""
    for number in range(60):
        folder = tmp_path / "val" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(40 + number, 40, number))
    torch.save(vgg.VGG("vgg11", 2, (8, 8, 16, 16, 16), 32).state_dict(), str(tmp_path / "weights.pth"))
    flags = ["--resume", tmp_path / "weights.pth", "--image-size", 32, "--eval-scales", 32, 40, 48, "-b", 30]
    found = {}
    for workers in (0, 3):
        result = run_with_descriptors("n 64", tmp_path, "-e", *flags, "-j", workers, "--output-dir", tmp_path)
        assert result.code == 0, result.err
        found[workers] = (tmp_path / "metrics.json").read_text()
    assert found[0] == found[3]
