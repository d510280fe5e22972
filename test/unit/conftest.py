# SPDX-License-Identifier: BSD-3-Clause
"""What the tests share: main.py as a user runs it, and small data sets of real pictures."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault('TORCH_DEVICE_BACKEND_AUTOLOAD', '0')  # as accelerator.py, before any test imports torch
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, REPOSITORY)


def pytest_configure(config):
    """Where tests run side by side (pytest -n), each worker and what it starts get their share of the cores."""
    worker = getattr(config, 'workerinput', None)
    if worker and hasattr(os, 'sched_setaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[int(worker['workerid'][2:])::worker['workercount']] or cores))


class Result:
    """A finished command: its exit code and what it said."""

    def __init__(self, finished):
        self.code, self.out, self.err = finished.returncode, finished.stdout, finished.stderr

    def accuracy(self):
        """(Acc@1, Acc@5) of the last validation, as printed."""
        words = [line for line in self.out.splitlines() if '[AVG-ACC]' in line][-1].split()
        return words[words.index('Acc@1') + 1], words[words.index('Acc@5') + 1]


def run(*command, timeout=300, cwd=None, env=None):
    paths = [REPOSITORY] + [path for path in [os.environ.get('PYTHONPATH')] if path]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **(env or {}))
    return Result(subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 universal_newlines=True, timeout=timeout, cwd=cwd, env=environment))


MAIN = os.path.join(REPOSITORY, 'main.py')
SMALL_MAIN = os.path.join(REPOSITORY, 'test', 'unit', 'small.py')


def run_main(*flags, program=SMALL_MAIN, **options):
    """python main.py FLAGS on the CPU, with small.py's network where MAIN is not asked for."""
    return run(sys.executable, program, '--device', 'cpu', *flags, **options)


def events(folder, kind=None):
    with open(os.path.join(str(folder), 'metrics.jsonl')) as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if kind in (None, record['event'])]


def picture(width, height, seed):
    """A picture with structure at every scale, as photographs have: (H, W, 3) uint8."""
    rng = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (3, 9, 27, 81):
        noise = Image.fromarray(rng.randint(0, 256, (cells, cells, 3)).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), Image.BICUBIC), np.float32) / cells
    total -= total.min()
    return (total / total.max() * 255).astype(np.uint8)


def make_folder(root, classes=3, train=8, val=5, size=(96, 72)):
    """ROOT/train and ROOT/val with JPEGs; each class has a colour of its own, so that it can be learnt."""
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            folder = os.path.join(str(root), split, 'class {}'.format(label))
            os.makedirs(folder)
            for number in range(count):
                pixels = picture(size[0] + number % 3, size[1] + number % 2, label * 1000 + number + 500 * (split == 'val'))
                pixels[..., label % 3] = 255 - pixels[..., label % 3] // 4
                Image.fromarray(pixels).save(os.path.join(folder, '图 {:03d}.JPEG'.format(number)), quality=90)
    return str(root)


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    """Indexes of the tests' folders go to a cache folder of their own."""
    os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder of JPEGs, its name with a space: 3 classes, 24 to train on, 15 to validate on."""
    return make_folder(tmp_path_factory.mktemp('a folder'))


@pytest.fixture(scope='session')
def folder37(tmp_path_factory):
    """37 validation images in 2 classes, a number that divides by nothing."""
    root = tmp_path_factory.mktemp('thirty-seven')
    make_folder(root, classes=2, train=8, val=19)
    os.remove(os.path.join(str(root), 'val', 'class 1', '图 018.JPEG'))
    return str(root)
