# SPDX-License-Identifier: BSD-3-Clause
"""One process of torture's validation_counts: main.validate over 1 to 40 images, against counts made one by one."""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from engine.checkpoints.contents import TrainState
from engine.console import exit_process
from engine.data import ResumableBatchSampler
from engine.data.datasets import ArrayDataset, read_digits
from engine.device import Amp, ComputeDevice
from engine.parallel import Communicator, Ranks
from engine.records.logger import Logger
from engine.signals import StopSignals

import main

import torch

comm = Communicator(Ranks(*map(int, sys.argv[2:])), "gloo", sys.argv[1], timeout=60, report=print)
device = ComputeDevice("cpu", local_world_size=comm.world_size)
args = argparse.Namespace(print_freq=1000, workers=0, processes=1, seed=0)
job = main.Job(args, comm, device, Amp(device), Logger(writes=False), StopSignals())
job.stop.training = True
digits = read_digits(training=False)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
normalize = device.normalizer(digits.preprocessing.mean, digits.preprocessing.std)


def predict(images: torch.Tensor) -> torch.Tensor:
    return network(normalize(images))


with torch.no_grad():
    logits = [network(normalize(torch.as_tensor(digits.images[index : index + 1]))) for index in range(40)]
for count in range(1, 41):
    dataset = ArrayDataset(
        digits.images[:count], digits.labels[:count], digits.classes, digits.preprocessing, default_hflip=0.0
    )
    top1 = sum(int(logits[index].argmax()) == dataset.labels[index] for index in range(count))
    top5 = sum(int(dataset.labels[index]) in logits[index].topk(5)[1][0].tolist() for index in range(count))
    sampler = ResumableBatchSampler(count, 1 + count % 7, rank=comm.rank, world_size=comm.world_size, shuffle=False)
    loader = main.build_loader(job, dataset, dataset.preprocessing, sampler)
    metrics = main.validate(job, network, predict, loader, TrainState())
    assert metrics is not None
    found = metrics["acc1"], metrics["acc5"]
    assert found == (100 * top1 / count, 100 * top5 / count), (count, comm.world_size, found, top1, top5)
comm.close()
exit_process(0)
