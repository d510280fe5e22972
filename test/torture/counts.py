# SPDX-License-Identifier: BSD-3-Clause
"""One process of torture.py's validation_counts: main.validate over 1 to 40 images, against counts made one by one."""
import os
import sys
import tempfile
import types

import accelerator  # noqa: F401  before torch
import torch

import images
import main
import metrics
import processes

args = main.parse_args(['--device', 'cpu', '-p', '1000', '--image-size', '32'])
accelerator.choose(args)
world = processes.World('gloo', sys.argv[1])
args.processes, args.nodes, args.workers = world.world_size, 1, 0
device = accelerator.Accelerator(args, 0, world.world_size)
digits = images.read_digits(training=False)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
normalise = main.make_normalise(digits, device)
with torch.no_grad():
    logits = [network(normalise(torch.as_tensor(digits.images[index:index + 1]))) for index in range(40)]
with tempfile.TemporaryDirectory() as folder:
    for count in range(1, 41):
        source = images.Arrays(digits.images[:count], digits.labels[:count], digits.classes, mean=digits.mean, std=digits.std,
                               flip=False)
        first = sum(int(logits[index].argmax()) == source.labels[index] for index in range(count))
        five = sum(int(source.labels[index]) in logits[index].topk(5)[1][0].tolist() for index in range(count))
        args.batch_size = world.world_size * (1 + count % 7)
        log = metrics.Log(folder, speaks=False, writes=False)
        run = types.SimpleNamespace(args=args, world=world, accelerator=device, network=network, normalise=normalise, log=log,
                                    stop=False, epoch=0, step=0)
        _, acc1, acc5 = main.validate(run, main.build_loader(source, args, world, device, training=False))
        assert (acc1, acc5) == (100.0 * first / count, 100.0 * five / count), (count, world.world_size, acc1, acc5)
world.close()
os._exit(0)
