# SPDX-License-Identifier: BSD-3-Clause
"""One process of torture's validation_counts: main.validate over 1 to 40 images, against counts made one by one."""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import main
from engine.checkpoints.contents import TrainState
from engine.console import exit_process
from engine.data.datasets import ArrayDataset, read_digits
from engine.data.loader import BatchLoader, ResumableBatchSampler
from engine.device.compute import ComputeDevice
from engine.parallel.communicator import Communicator
from engine.records.logger import Logger
from engine.signals import StopSignals

import torch

group = Communicator("gloo", sys.argv[1], timeout=60, report=print)
accelerator = ComputeDevice("cpu", local_world_size=group.world_size)
runtime = main.Runtime(group, accelerator, Logger(writes=False), StopSignals())
runtime.stop.training = True
digits = read_digits(training=False)
torch.manual_seed(0)
args = argparse.Namespace(print_freq=1000)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
normalize = accelerator.normalizer(digits.mean, digits.std)


def predict(images: torch.Tensor) -> torch.Tensor:
    return network(normalize(images))


with torch.no_grad():
    logits = [network(normalize(torch.as_tensor(digits.images[index : index + 1]))) for index in range(40)]
for count in range(1, 41):
    dataset = ArrayDataset(
        digits.images[:count],
        digits.labels[:count],
        digits.classes,
        mean=digits.mean,
        std=digits.std,
        default_hflip=0.0,
    )
    top1 = sum(int(logits[index].argmax()) == dataset.labels[index] for index in range(count))
    top5 = sum(int(dataset.labels[index]) in logits[index].topk(5)[1][0].tolist() for index in range(count))
    sampler = ResumableBatchSampler(count, 1 + count % 7, rank=group.rank, world_size=group.world_size, shuffle=False)
    loader = BatchLoader(dataset, sampler, 32, options={})
    totals = main.validate(args, runtime, network, predict, loader, TrainState())
    assert totals is not None and totals[:3] == (count, top1, top5), (count, group.world_size, totals, top1, top5)
group.close()
exit_process(0)
