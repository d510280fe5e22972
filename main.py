# SPDX-License-Identifier: BSD-3-Clause
"""Train VGG on ImageNet, CIFAR-10 or a folder of pictures, on an NPU, a GPU or a CPU.

    python main.py                                              # the embedded digits, on whatever device there is
    python main.py /data/imagenet --amp --device gpu            # one GPU, mixed precision
    python main.py /data/imagenet --amp --device npu --multiprocessing-distributed -b 2048 --lr 0.08   # all NPUs

Result: 97.49 to 98.89 % Acc@1 on the digits for five seeds, 200 s each on two cores of an AMD EPYC with bf16 (quickstart.sh).
"""
import argparse
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field

import accelerator
from accelerator import Accelerator, Scaler
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, get_worker_info

import checkpoint
import images
import jpeg
import processes
import vgg
from metrics import Counts, Log, StepLine, Throughput, averages

HERE = os.path.dirname(os.path.abspath(__file__))
MULTI_NODE_PORT = 59629
OF_A_NODE = ('data', 'workers', 'output_dir', 'resume', 'gpu', 'device_list', 'rank', 'addr', 'dist_url')
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
SKIPS_THAT_STOP = 10  # steps in a row whose gradients were not finite


class WrongUse(Exception):
    """Flags, files or data that do not fit; the text says what and what to do. Exit code 2."""


class Diverged(Exception):
    """Training cannot go on; the text says why. Exit code 1."""
    exit_code = 1


USER_ERRORS = (WrongUse, Diverged, accelerator.Unavailable, images.BadData, checkpoint.BadCheckpoint,
               processes.LaunchError, processes.Lost)


# --- flags ------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes `-b8` for `-b 8` on Python 3.7 too."""

    def error(self, message):
        self.exit(processes.WRONG_USE, '{0}: error: {1}; see python {0} --help\n'.format(self.prog, message))

    def parse_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            action = self._option_string_actions.get(word[:2])
            if len(word) > 2 and word[0] == '-' and word[1] != '-' and action is not None and action.nargs is None:
                words += [word[:2], word[2:].lstrip('=')]
            else:
                words.append(word)
        return super().parse_args(words, namespace)


def number(kind, least=None, most=None, *, above=None):
    """An argparse type: a finite int or float inside the bounds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError('{!r} is not {} number'.format(text, 'a whole' if kind is int else 'a'))
        if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most) \
                or (above is not None and value <= above):
            bounds = ['at least {}'.format(least)] * (least is not None) + ['above {}'.format(above)] * (above is not None) \
                + ['at most {}'.format(most)] * (most is not None)
            raise argparse.ArgumentTypeError('{} is out of range: {}'.format(text, ', '.join(bounds) or 'a finite number'))
        return value
    return parse


def device_list(text):
    try:
        devices = [int(word) for word in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError('{!r} is not a list of device numbers such as 0,1,2,3'.format(text))
    if min(devices) < 0 or len(set(devices)) < len(devices):
        raise argparse.ArgumentTypeError('{!r} names a device twice or below 0'.format(text))
    return devices


def loss_scale(text):
    return text if text == 'dynamic' else number(float, above=0)(text)


def parse_args(argv=None):
    """The flags, with every check that needs neither torch nor a device. Exits with 2 where one fails."""
    parser = Parser('main.py', description=__doc__.splitlines()[0], allow_abbrev=False)
    data = parser.add_argument_group('data')
    data.add_argument('dir', metavar='DIR', nargs='?', help='the same as --data')
    data.add_argument('--data', help='folder with train/ and val/, or CIFAR-10 (default: the embedded digits)')
    data.add_argument('-j', '--j', '--workers', dest='workers', type=number(int, 0), metavar='N',
                      help='loader workers of this node, shared out over its processes (default: the cores left)')
    data.add_argument('--image-size', type=number(int, 32), metavar='S',
                      help='pixels a side (default: 224, CIFAR-10 and digits 32)')
    data.add_argument('--bad-images', default='error', choices=['error', 'skip'],
                      help='pictures that cannot be read: stop at the first, or check all once ahead and leave them out '
                           '(default: %(default)s)')
    data.add_argument('--dummy', type=number(int, 1), nargs='?', const=1281167, metavar='N',
                      help='N synthetic images made on the device, for measuring (default N: %(const)s)')

    model = parser.add_argument_group('model')
    model.add_argument('--arch', default='vgg16', choices=vgg.ARCHITECTURES, help='(default: %(default)s)')
    model.add_argument('--pretrained', metavar='PATH', help="weights to start from: torchvision's, ModelZoo's or ours")
    model.add_argument('--freeze-features', action='store_true',
                       help='train the classifier alone, on the features of --pretrained')

    training = parser.add_argument_group('training')
    training.add_argument('--epochs', type=number(int, 1), default=90, metavar='N', help='(default: %(default)s)')
    training.add_argument('--start-epoch', type=number(int, 0), default=0, metavar='N', help='(default: %(default)s)')
    training.add_argument('-b', '--batch-size', type=number(int, 1), default=256, metavar='N',
                          help='images a step on this node, over all its devices (default: %(default)s)')
    training.add_argument('--accum-steps', type=number(int, 1), default=1, metavar='N',
                          help='batches of -b to one optimizer step (default: %(default)s)')
    training.add_argument('--lr', '--learning-rate', type=number(float, 0), default=0.01, metavar='RATE',
                          help='peak learning rate, cosine to --min-lr by epoch (default: %(default)s)')
    training.add_argument('--min-lr', type=number(float, 0), default=0.0, metavar='RATE', help='(default: %(default)s)')
    training.add_argument('--warmup-epochs', type=number(int, 0), default=0, metavar='N',
                          help='epochs of linear warm-up before the cosine (default: %(default)s)')
    training.add_argument('--momentum', type=number(float, 0, 1), default=0.9, metavar='M', help='(default: %(default)s)')
    training.add_argument('--wd', '--weight-decay', dest='weight_decay', type=number(float, 0), default=1e-4,
                          metavar='W', help='(default: %(default)s)')
    training.add_argument('--label-smoothing', type=number(float, 0, 1), default=0.0, metavar='S',
                          help='(default: %(default)s)')
    training.add_argument('--clip-grad-norm', type=number(float, above=0), metavar='NORM',
                          help='largest norm of all gradients together (default: no limit)')
    training.add_argument('--ema-decay', type=number(float, 0, 1), default=0.0, metavar='DECAY',
                          help='also average the weights, and validate the averages: 0.9999, say (default: off)')
    training.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=49, help='(default: %(default)s)')
    training.add_argument('--stop-step-num', type=number(int, 1), metavar='N', help='end cleanly after N steps in all')

    run = parser.add_argument_group('evaluating, resuming, recording')
    run.add_argument('-e', '--e', '--evaluate', dest='evaluate', action='store_true',
                     help='evaluate the weights of --resume or --pretrained, and end')
    run.add_argument('--report', metavar='DIR', help='with -e: also write the evaluation as a page, DIR/index.html')
    run.add_argument('--eval-freq', type=number(int, 1), default=1, metavar='N',
                     help='epochs between validations; the last always validates (default: %(default)s)')
    run.add_argument('-p', '--p', '--print-freq', dest='print_freq', type=number(int, 1), default=10, metavar='N',
                     help='steps between log lines (default: %(default)s)')
    run.add_argument('--resume', metavar='PATH', help='checkpoint to continue')
    run.add_argument('--auto-resume', action='store_true',
                     help='continue from the newest good checkpoint in --output-dir, where there is one')
    run.add_argument('--save-freq', type=number(int, 0), default=0, metavar='N',
                     help='also save every N steps (default: at the end of epochs only)')
    run.add_argument('--output-dir', default='.', metavar='DIR', help='checkpoints, metrics, curves (default: here)')
    run.add_argument('--profile', action='store_true',
                     help='write trace.json to --output-dir: ten steps after five of warm-up, on rank 0')

    device = parser.add_argument_group('device and precision')
    device.add_argument('--device', default='auto', choices=['auto', 'npu', 'gpu', 'cuda', 'mps', 'cpu'],
                        help='(default: the first of npu, gpu, mps, cpu that works)')
    device.add_argument('--gpu', '--gup', dest='gpu', type=number(int, 0), metavar='N',
                        help='the one device to use: an index into --device-list where given, else its number')
    device.add_argument('--amp', action='store_true', help='mixed precision')
    device.add_argument('--opt-level', default='O1', choices=['O0', 'O1', 'O2', 'O3'],
                        help='with --amp: O0 fp32, O1 autocast, O2 half weights with fp32 masters, O3 pure half '
                             '(default: %(default)s)')
    device.add_argument('--amp-dtype', default='auto', choices=['auto', 'fp16', 'bf16'],
                        help='(default: bf16 where the device is good at it, else fp16)')
    device.add_argument('--loss-scale-value', type=loss_scale, metavar='SCALE',
                        help='of fp16: a number, or dynamic (default: 1024)')
    device.add_argument('--deterministic', action='store_true', help='bitwise repeatable on a GPU too, and slower')
    device.add_argument('--compile', action='store_true',
                        help='torch.compile the training step (torch 2, gpu and cpu; needs a C++ compiler)')

    parallel = parser.add_argument_group('several devices, several nodes')
    parallel.add_argument('--multiprocessing-distributed', action='store_true',
                          help='one process for each device of --device-list')
    parallel.add_argument('--device-list', type=device_list, metavar='0,1,…',
                          help='(default: all; on a cpu its length is the number of processes)')
    parallel.add_argument('--world-size', type=number(int, -1), default=-1, metavar='N',
                          help='nodes with --multiprocessing-distributed, else processes (default: one)')
    parallel.add_argument('--rank', type=number(int, -1), default=-1, metavar='N', help="this node's, from 0")
    parallel.add_argument('--addr', default='127.0.0.1', help='address of the node of rank 0 (default: %(default)s)')
    parallel.add_argument('--dist-url', metavar='URL', help='(default: tcp://ADDR:PORT; env:// under torchrun)')
    parallel.add_argument('--dist-backend', choices=['hccl', 'nccl', 'gloo'], help='(default: what the device has)')
    parallel.add_argument('--grad-compress', default='none', choices=['none', 'bf16', 'fp16'],
                          help='format of the gradients on the wire (torch 2; default: that of the weights)')

    args = parser.parse_args(argv)
    if args.dir and args.data and os.path.abspath(args.dir) != os.path.abspath(args.data):
        parser.error('DIR is {} and --data is {}: give one'.format(args.dir, args.data))
    args.data = args.data or args.dir
    del args.dir
    args.device = 'gpu' if args.device == 'cuda' else args.device
    if args.evaluate and not (args.resume or args.pretrained):
        parser.error('--evaluate needs weights: --resume PATH or --pretrained PATH')
    if args.report and not args.evaluate:
        parser.error('--report tells of an evaluation: use it with --evaluate')
    if args.freeze_features and not (args.pretrained or args.resume):
        parser.error('--freeze-features leaves the features as they are, and without --pretrained PATH they are random')
    if args.dummy and (args.data or args.evaluate):
        parser.error('--dummy takes no data and cannot be evaluated: leave one of them out')
    if args.resume and args.auto_resume:
        parser.error('--resume names a file and --auto-resume looks for one: give one of them')
    for flag, path in (('--resume', args.resume), ('--pretrained', args.pretrained)):
        # Only global rank 0 reads the file.
        if path and not os.path.isfile(path) and args.rank <= 0 and os.environ.get('RANK', '0') == '0':
            parser.error('{} {}: no such file'.format(flag, path))
    if args.data and not os.path.isdir(args.data):
        parser.error('--data {}: no such folder'.format(args.data))
    if args.start_epoch >= args.epochs:
        parser.error('--start-epoch {} leaves nothing of --epochs {}'.format(args.start_epoch, args.epochs))
    if args.world_size == 0:
        parser.error('--world-size 0: at least one')
    if args.warmup_epochs >= args.epochs:
        parser.error('--warmup-epochs {} leaves nothing of --epochs {}'.format(args.warmup_epochs, args.epochs))
    return args


def settle_processes(args):
    """Work out who runs where: sets `args.processes` (of this node), `args.nodes`, `args.rank`, `args.dist_url`.

    `--world-size` and `--rank` count nodes with --multiprocessing-distributed and processes without; under torchrun its
    variables say it all. A process started by hand counts as a node of its own.
    """
    if processes.under_torchrun():
        args.processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        args.nodes = int(os.environ['WORLD_SIZE']) // args.processes
        args.rank = int(os.environ['RANK']) // args.processes
        args.dist_url = args.dist_url or 'env://'
        args.multiprocessing_distributed = False
        if not accelerator.devices_suffice(args):
            raise WrongUse('torchrun starts {} processes here, but there are {} devices: use --nproc-per-node {}'.format(
                args.processes, len(args.device_list), len(args.device_list)))
    else:
        args.processes = len(args.device_list) if args.multiprocessing_distributed else 1
        args.nodes = max(1, args.world_size)
        if args.nodes == 1:
            args.rank = 0
        elif not 0 <= args.rank < args.nodes:
            raise WrongUse('--rank {} does not fit --world-size {}: give each node its own, from 0 to {}'.format(
                args.rank, args.nodes, args.nodes - 1))
        args.dist_url = rendezvous_url(args)
    if args.batch_size % args.processes:
        below = args.batch_size // args.processes * args.processes
        raise WrongUse('--batch-size {} does not divide by {} processes: use {}{}'.format(
            args.batch_size, args.processes, '{} or '.format(below) if below else '', below + args.processes))
    if args.workers is None:
        args.workers = accelerator.cores_left(args.device, args.processes)


def rendezvous_url(args):
    """Where the processes meet: --dist-url, else --addr, with a free port on one node and 59629 on several."""
    host, port = args.addr, None
    if args.dist_url:
        match = re.match(r'^tcp://(\[[^\]]+\]|[^:/]+)(?::(\d+))?/?$', args.dist_url)
        if match is None:
            if args.dist_url.startswith(('env://', 'file://')):
                return args.dist_url
            raise WrongUse('--dist-url {}: expected tcp://HOST:PORT, env:// or file://PATH'.format(args.dist_url))
        # The reference's scripts pass a loopback URL and the real address beside it.
        given = match.group(1).strip('[]')
        host = args.addr if given in LOOPBACK and args.addr not in LOOPBACK else given
        port = match.group(2)
    if port is None:
        port = processes.free_port() if args.nodes == 1 else MULTI_NODE_PORT
    return 'tcp://{}:{}'.format('[{}]'.format(host) if ':' in host else host, port)


def check_same_flags(world, args):
    """Raise WrongUse where a node was started with another value of a flag than the node of rank 0."""
    own = {name: value for name, value in vars(args).items() if name not in OF_A_NODE}
    of_rank_0 = world.broadcast(own)
    different = ['--{} is {} here and {} on rank 0'.format(name.replace('_', '-'), own[name], of_rank_0[name])
                 for name in sorted(own) if own[name] != of_rank_0[name]]
    if world.any(different):
        raise WrongUse('the nodes were started with different flags: {}'.format(
            ', '.join(different) or 'another one has others than rank 0'))


# --- data -------------------------------------------------------------------------------------------------------------

def build_sources(args, world, log):
    """(training, validation) sources of single pictures; no training source for --evaluate or --dummy.

    The first process of a node is the first to build them: it scans a folder, and the others find its index. Raises
    images.BadData, and WrongUse where the classes of the two differ or the processes see other files.
    """
    if world.local_rank != 0:
        world.barrier()
    try:
        training, validation = open_sources(args, log)
    finally:
        if world.local_rank == 0:
            world.barrier()
    own = [source.fingerprint for source in (training, validation) if source is not None]
    if world.any(own != world.broadcast(own)):
        raise WrongUse('the processes do not see the same data: every node needs the same files under --data')
    return training, validation


def open_sources(args, log):
    if args.dummy:
        return None, None
    if args.data is None:
        training, validation = images.read_digits(training=True), images.read_digits(training=False)
    elif images.find_cifar10(args.data):
        training = None if args.evaluate else images.read_cifar10(args.data, training=True)
        validation = images.read_cifar10(args.data, training=False)
    else:
        def check(verdicts, count):
            log.line('=> checking {:,} pictures, once'.format(count))
            return log.track(verdicts, count, 'Checking')

        check = check if args.bad_images == 'skip' else None
        training = None
        if not args.evaluate:
            decode_box = jpeg.load(images.cache_folder())
            if decode_box is None:
                log.line('=> jpeg.c cannot be compiled here (no C compiler?): pictures load at half the speed')
            training = images.Folder(os.path.join(args.data, 'train'), resize=accelerator.antialiased_resize,
                                     decode_box=decode_box, check=check)
        validation = images.Folder(os.path.join(args.data, 'val'), check=check)
        if training is not None:
            check_classes(training.classes, validation.classes, 'train/', 'val/')
    return training, validation


def check_classes(first, second, first_name, second_name):
    """Raise WrongUse, naming the first difference, where two lists of class names differ."""
    for position in range(max(len(first), len(second))):
        pair = [names[position] if position < len(names) else None for names in (first, second)]
        if pair[0] != pair[1]:
            raise WrongUse('the classes differ: number {} is {} in {} and {} in {}'.format(
                position, repr(pair[0]) if pair[0] else 'missing', first_name,
                repr(pair[1]) if pair[1] else 'missing', second_name))


def build_loader(source, args, world, device, *, training, start=(0, 0)):
    """A loader of (images (n, S, S, 3) uint8, target (n,) int64) for this process.

    Training goes on from `start` (epoch, step) over all epochs without a pause between them; validation is one pass.
    """
    batches = images.Batches(len(source), args.batch_size // args.processes, rank=world.rank,
                             world_size=world.world_size, shuffle=training, seed=args.seed, start=start,
                             epochs=args.epochs if training else 1, accum_steps=args.accum_steps if training else 1)
    if batches.steps_per_epoch == 0:
        raise WrongUse('{} images are fewer than the {} of one step: use a smaller --batch-size'.format(
            len(source), args.batch_size * args.nodes * args.accum_steps))
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores: -j says how many
    dataset = images.Dataset(source, size=args.image_size, training=training, seed=args.seed, allocate=Buffers())
    return DataLoader(dataset, batch_size=None, sampler=batches, collate_fn=to_shared_memory,
                      worker_init_fn=functools.partial(processes.begin_loader_worker, os.getpid()),
                      **device.loader_options(-(-args.workers // args.processes)))


class Buffers:
    """Memory for the batches of a Dataset: in a loader worker shared, and used again for every third batch.

    New shared memory costs a page fault every 4 KiB, an eighth of the loading time. A DataLoader asks a worker for its batch
    n when it hands out n - 2; batch n - 3 has been copied to the device by then.
    """

    def __init__(self):
        self.kept = []

    def __call__(self, shape):
        """A uint8 tensor. `shape` may differ from that of an earlier call in the number of pictures."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        if len(self.kept) == 3 and len(self.kept[0]) >= shape[0]:
            self.kept.append(self.kept.pop(0))
        else:
            self.kept = self.kept[-2:] + [torch.empty(shape, dtype=torch.uint8).share_memory_()]
        return self.kept[-1][:shape[0]]


def to_shared_memory(batch):
    """A batch as tensors, in shared memory where a loader worker made it.

    The queue to the training process would do the same, but in a thread whose errors are lost: where /dev/shm is full the
    run would wait for ever (torch 2).
    """
    if isinstance(batch, images.BadImage):
        return batch
    tensors = [torch.as_tensor(array) for array in batch]
    return [tensor.share_memory_() for tensor in tensors] if get_worker_info() is not None else tensors


class DummyLoader:
    """The same random batch, made on the device, as often as asked for: measures the step and nothing else."""

    def __init__(self, args, device):
        local_batch = args.batch_size // args.processes
        self.sampler = images.Batches(args.dummy, local_batch, rank=0, world_size=args.processes * args.nodes,
                                      shuffle=True, accum_steps=args.accum_steps)
        if self.sampler.steps_per_epoch == 0:
            raise WrongUse('--dummy {} is less than one step of images'.format(args.dummy))
        self.batch = (torch.randint(0, 256, (local_batch, args.image_size, args.image_size, 3), device=device).byte(),
                      torch.randint(0, 1000, (local_batch,), device=device))

    def __iter__(self):
        while True:
            yield self.batch


def fetch(batches):
    """The next batch of a loader's iterator; raises the BadImage that came in its place."""
    try:
        batch = next(batches)
    except (OSError, EOFError) as error:  # of the socket over which a worker hands over memory, when it has died
        raise processes.loader_lost(error)
    if isinstance(batch, images.BadImage):
        raise batch
    return batch


# --- the run: what a checkpoint holds ---------------------------------------------------------------------------------

@dataclass
class Run:
    """All that training changes, and what it runs on. A checkpoint is this, as plain values and tensors."""
    args: argparse.Namespace
    world: processes.World
    accelerator: Accelerator
    log: Log
    stop: processes.StopSignals
    network: vgg.VGG
    classes: list
    normalise: object          # (N, S, S, 3) uint8 on the host or device -> (N, 3, S, S) on the device
    identity: dict             # what must agree for an epoch to be continued in its middle
    preprocessing: dict        # what a picture goes through to be classified, for predict.py and export.py
    model: torch.nn.Module = None  # the network as trained: wrapped by DDP on several processes, compiled by --compile
    trace: object = None       # the profiler of --profile
    scaler: Scaler = None
    writer: checkpoint.Writer = field(default_factory=checkpoint.Writer)
    epoch: int = 0
    step_in_epoch: int = 0     # optimizer steps of this epoch that are done
    step: int = 0              # in all
    best_acc1: float = 0.0
    counts: Counts = None      # of this epoch


def state_of(run):
    """The checkpoint. Parameter names are torchvision's, values fp32; the first five keys are the reference's.

    All processes call it, rank 0 gets it. A synchronisation.
    """
    counts = run.world.sum(run.counts.read())
    if run.world.rank != 0:
        return None
    averages = {'state_dict_ema': run.scaler.model_state_dict(run.network, averaged=True)} if run.args.ema_decay else {}
    return {'epoch': run.epoch, 'arch': run.args.arch, 'state_dict': run.scaler.model_state_dict(run.network), **averages,
            'best_acc1': run.best_acc1, 'optimizer': run.scaler.optimizer_state_dict(),
            'amp': run.scaler.state_dict(), 'step': run.step, 'step_in_epoch': run.step_in_epoch, 'counts': counts,
            'classes': run.classes, 'identity': run.identity, 'world_size': run.world.world_size,
            'preprocessing': run.preprocessing}


def save(run, *, best=False, final=False):
    """Write checkpoint.pth.tar on global rank 0, and name it model_best.pth.tar too where it is the best.

    Training goes on while the disk works. A save that fails leaves the old file and is told; the final one is waited for,
    and fails the run (Diverged). Weights whose gradients are not finite may be ruined: they replace no good checkpoint.
    """
    begin = time.perf_counter()
    check_finite(run)
    if run.scaler.skipped_in_a_row.item() and not (best or final):  # a synchronisation
        run.log.line('=> no checkpoint at step {}: its gradients were not finite'.format(run.step))
        return
    state = state_of(run)
    if state is not None:
        folder = run.args.output_dir
        path = os.path.join(folder, 'checkpoint.pth.tar')
        warn_of_failed_save(run)
        run.writer.save(state, path, also=os.path.join(folder, 'model_best.pth.tar') if best else None)
        if final:
            error = run.writer.wait()
            if error is not None:
                raise Diverged('{}: the last checkpoint could not be written ({}); the one before it is whole'.format(
                    path, error))
    run.log.event('checkpoint', epoch=run.epoch, step=run.step, seconds=time.perf_counter() - begin)


def warn_of_failed_save(run):
    error = run.writer.wait()
    if error is not None:
        print('main.py: warning: {}: the checkpoint was not saved ({}); training goes on'.format(
            run.args.output_dir, error), file=sys.stderr)


def find_checkpoint(args, log):
    """The state to continue from, or None: that of --resume, or for --auto-resume the newest good one."""
    if args.resume:
        log.line("=> resuming from '{}'".format(args.resume))
        return load_checkpoint(args.resume)
    if not args.auto_resume:
        return None
    damaged = None
    for name in ('checkpoint.pth.tar', 'checkpoint.pth.tar.previous'):
        path = os.path.join(args.output_dir, name)
        if os.path.exists(path):
            try:
                state = load_checkpoint(path)
                log.line("=> resuming from '{}'".format(path))
                return state
            except checkpoint.BadCheckpoint as error:
                damaged = error
                print('main.py: warning: {}; trying the one before it'.format(error), file=sys.stderr)
    if damaged is not None:
        raise damaged  # never a silent fresh start
    return None


def load_checkpoint(path):
    state = checkpoint.load(path)
    if not isinstance(state, dict):
        raise checkpoint.BadCheckpoint('{}: holds a {}, not a checkpoint'.format(path, type(state).__name__))
    return state


def weights_of(state, path, averaged=True):
    """The renamed state_dict in a checkpoint, or in a file that is nothing but one; the averaged one where there are two."""
    weights = state.get('state_dict', state)
    if averaged and 'state_dict_ema' in state:
        weights = state['state_dict_ema']
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise WrongUse('{}: holds no weights (a state_dict of tensors)'.format(path))
    return vgg.rename(weights)


def load_pretrained(network, path, classes, world, log):
    """Take the weights of a file; a last layer for another number of classes is left as initialised, and said so."""
    state = world.broadcast(load_checkpoint(path) if world.rank == 0 else None)
    weights = weights_of(state, path)
    for part in ('.weight', '.bias'):
        name = vgg.LAST_LAYER + part
        own = network.state_dict()[name]
        if name in weights and weights[name].shape != own.shape and weights[name].shape[1:] == own.shape[1:]:
            log.line('=> {}: {} classes in {}, {} here: initialised anew'.format(
                name, len(weights[name]), path, len(classes)))
            weights[name] = own
    load_weights(network, weights, path)
    log.line("=> loaded the {}weights of '{}'".format('averaged ' * ('state_dict_ema' in state), path))


def load_weights(network, weights, path):
    problem = vgg.mismatch(weights, network)
    if problem:
        raise WrongUse('{}: {}; check --arch and the number of classes'.format(path, problem))
    network.load_state_dict(weights, strict=False)


def check_resumable(state, args, classes, identity):
    """Raise WrongUse, with the two values, where a checkpoint belongs to another model or to another half epoch."""
    if state.get('arch') not in (None, args.arch):
        raise WrongUse('--resume: the checkpoint is of --arch {}, here {}'.format(state['arch'], args.arch))
    if state.get('classes'):
        check_classes(state['classes'], classes, 'the checkpoint', 'the data')
    if state.get('step_in_epoch') and not args.evaluate:
        for name, value in identity.items():
            if (state.get('identity') or {}).get(name) != value:
                raise WrongUse('--resume: the checkpoint is from the middle of an epoch with {} {}, here {}'.format(
                    name, (state.get('identity') or {}).get(name), value))


def restore(run, state):
    """Continue where a checkpoint, ours or the reference's, was written. The weights are in place already."""
    try:
        run.scaler.load_optimizer_state(state['optimizer'])
        run.scaler.load_state_dict(state.get('amp') or {})
        if run.args.ema_decay and 'state_dict_ema' in state:
            run.scaler.load_averages(run.network, vgg.rename(state['state_dict_ema']))
        run.epoch, run.step_in_epoch = int(state['epoch']), int(state.get('step_in_epoch', 0))
        run.step, run.best_acc1 = int(state.get('step', 0)), float(state.get('best_acc1', 0.0))
        if run.step_in_epoch and run.world.rank == 0:  # the counts are sums over all processes
            run.counts.load(state['counts'])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WrongUse('--resume: the checkpoint cannot be continued ({}: {}); --pretrained takes its weights alone'.format(
            type(error).__name__, error))
    if bool(run.args.ema_decay) != ('state_dict_ema' in state):
        run.log.line('=> the checkpoint has no averaged weights: averaging begins here' if run.args.ema_decay else
                     '=> the averaged weights of the checkpoint are left behind: --ema-decay would continue them')
    if state.get('world_size', run.world.world_size) != run.world.world_size:
        run.log.line('=> {} processes in place of {}: the same images in the same order, rounded differently'.format(
            run.world.world_size, state['world_size']))


# --- the loops --------------------------------------------------------------------------------------------------------

def learning_rate(epoch, args):
    """The rate of an epoch: linear warm-up, then a cosine from --lr to --min-lr (Loshchilov & Hutter, arXiv:1608.03983)."""
    if epoch < args.warmup_epochs:
        return args.lr * (epoch + 1) / (args.warmup_epochs + 1)
    done = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def cross_entropy(logits, target, label_smoothing=0.0):
    """Mean loss of (N, classes) logits, in fp32; smoothing as Szegedy et al., arXiv:1512.00567, section 7."""
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    loss = F.nll_loss(log_probabilities, target)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()
    return loss


def make_normalise(source, device):
    """uint8 pictures to what the network takes: sent as bytes, a quarter of the traffic, and scaled on the device."""
    mean = torch.tensor(source.mean, device=device.device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(source.std, device=device.device).view(1, 3, 1, 1) * 255)

    def normalise(pictures):
        """(N, S, S, 3) uint8 to (N, 3, S, S), channels last in memory where the device wants that."""
        pictures = device.to_device(pictures).permute(0, 3, 1, 2)
        pictures = pictures.to(torch.float32, memory_format=device.memory_format).sub_(mean).mul_(scale)
        return pictures.to(device.half) if device.half_weights else pictures
    return normalise


def train_one_epoch(run, batches, steps):
    """Train from run.step_in_epoch to the end of the epoch of `steps` steps. Returns whether to stop the run here."""
    args, device, scaler, log = run.args, run.accelerator, run.scaler, run.log
    run.model.train()
    if args.freeze_features:
        run.network.features.eval()  # batch norm's figures stay too
    rate = learning_rate(run.epoch, args)
    for group in scaler.optimizer.param_groups:
        group['lr'] = rate
    global_batch = args.batch_size * args.nodes * args.accum_steps
    clock = Throughput(min(steps - run.step_in_epoch, (args.stop_step_num or math.inf) - run.step))
    line = StepLine('Epoch: [{}]'.format(run.epoch), steps, run.step_in_epoch, run.counts.read())
    stopping = False

    with log.progress(steps * global_batch, run.step_in_epoch * global_batch, 'Epoch {}'.format(run.epoch)):
        while run.step_in_epoch < steps and not stopping:
            # Dropout depends on (seed, step, rank) alone, so that a resumed run draws the same masks.
            device.seed(((args.seed * 1000003 + run.step) * 1000003 + run.world.rank) % 2 ** 63)
            for part in range(args.accum_steps):
                before = time.perf_counter()
                pictures, target = fetch(batches)
                line.wait(time.perf_counter() - before)
                pictures, target = run.normalise(pictures), device.to_device(target)
                with device.local_gradients(run.model, part < args.accum_steps - 1):
                    with device.autocast():
                        logits = run.model(pictures)
                        loss = cross_entropy(logits, target, args.label_smoothing)
                    scaler.backward(loss / args.accum_steps)
                run.counts.update(loss * len(target), logits, target)
            scaler.step()
            run.step, run.step_in_epoch = run.step + 1, run.step_in_epoch + 1
            if args.ema_decay:  # the first steps weigh less, as in TensorFlow's ExponentialMovingAverage(num_updates)
                scaler.average(min(args.ema_decay, (1 + run.step) / (10 + run.step)))
            clock.step(global_batch, device.synchronize)
            log.tick(global_batch)
            if run.trace is not None:
                run.trace.step()

            # A signal, on whichever process, stops all of them after the same step.
            stopping = run.world.any(run.stop) or at_last_step(run)
            done = run.step_in_epoch
            if done == 1 or done % args.print_freq == 0 or done == steps or stopping:
                values = run.counts.read()  # a synchronisation, as is the next line
                check_finite(run)
                log.line(line.text(done, values))
                loss, acc1, acc5 = averages(values)
                log.event('train', epoch=run.epoch, step=run.step, samples=done * global_batch, loss=loss, acc1=acc1,
                          acc5=acc5, lr=rate)
            if args.save_freq and run.step % args.save_freq == 0 and done < steps and not stopping:
                clock.pause()
                save(run)
                clock.go_on()

    device.synchronize()
    loss, acc1, acc5 = averages(run.world.sum(run.counts.read()))
    rate_images = run.world.broadcast(clock.images_per_second())  # one figure in the logs of all nodes
    log.line('[npu id: 0 ] * FPS@all {:.3f}'.format(rate_images))
    if run.step_in_epoch == steps:
        log.event('epoch', epoch=run.epoch, step=run.step, samples=steps * global_batch, loss=loss, acc1=acc1, acc5=acc5,
                  lr=rate, images_per_second=rate_images, seconds=clock.seconds())
    return stopping


def check_finite(run):
    """Raise Diverged where ten steps in a row were skipped; alike on every process. A synchronisation."""
    if run.scaler.read_longest_skip() >= SKIPS_THAT_STOP:
        raise Diverged('the gradients of {} steps in a row were not finite, by step {}: the run has diverged; resume from the '
                       'last checkpoint with a lower --lr, --warmup-epochs or --clip-grad-norm'.format(
                           SKIPS_THAT_STOP, run.step))


def check_replicas(world, network):
    """Raise Diverged where the parameters of a process are not bit for bit those of rank 0."""
    own = accelerator.parameter_digest(network)
    apart = own != world.broadcast(own)
    if world.any(apart):
        raise Diverged('the parameters of the processes have drifted apart{}: faulty hardware or a library that computes '
                       'differently; continue from the last checkpoint'.format(
                           ' (rank {} is one)'.format(world.rank) if apart else ''))


def at_last_step(run):
    return run.args.stop_step_num is not None and run.step >= run.args.stop_step_num


def validate(run, loader, answers=None):
    """Loss and accuracy over the validation images, each counted once. Returns (loss, acc1, acc5), or None if stopped.

    answers: (2, images) float32 zeros, to be filled with this process's answers: the class plus one, its probability.
    """
    run.network.eval()
    run.world.broadcast_buffers(run.network)
    counts, device = Counts(run.accelerator.device), run.accelerator
    steps = loader.sampler.steps_per_epoch
    line, begin = StepLine('Test: ', steps), time.perf_counter()
    batches, requests = iter(loader), iter(loader.sampler)
    with torch.no_grad(), run.log.progress(loader.sampler.count, 0, 'Test'):
        for done in range(1, steps + 1):
            before = time.perf_counter()
            pictures, target = fetch(batches)
            line.wait(time.perf_counter() - before)
            _, indices = next(requests)
            if len(target):  # the last batch may leave nothing for this process
                target = device.to_device(target)
                with device.autocast():
                    logits = run.network(run.normalise(pictures))
                counts.update(cross_entropy(logits, target) * len(target), logits, target)
                if answers is not None:
                    first = logits.topk(min(5, logits.shape[1]), dim=1)[1][:, :1]  # as it is counted
                    found = torch.cat([first.float() + 1, logits.float().softmax(1).gather(1, first)], 1)
                    answers[:, torch.from_numpy(indices).to(answers.device)] = found.t()
            if done == 1 or done % run.args.print_freq == 0 or done == steps:
                run.log.line(line.text(done, counts.read()))  # a synchronisation
            run.log.tick(run.args.batch_size * run.args.nodes)
            if run.world.any(run.stop):
                return None
    totals = run.world.sum(counts.read())
    loss, acc1, acc5 = averages(totals)
    run.log.line('[npu id: 0 ] [AVG-ACC] * Acc@1 {:.3f} Acc@5 {:.3f}'.format(acc1, acc5))
    run.log.event('validate', epoch=run.epoch, step=run.step, samples=int(totals[0]), loss=loss, acc1=acc1, acc5=acc5,
                  seconds=time.perf_counter() - begin)
    return loss, acc1, acc5


# --- from start to end ------------------------------------------------------------------------------------------------

def main_worker(args):
    """One process of the job. Returns its exit code; raises USER_ERRORS."""
    stop = processes.StopSignals()
    world = processes.World(args.dist_backend, args.dist_url)
    index = args.device_list[world.local_rank % len(args.device_list)]
    device = Accelerator(args, index, processes=world.local_world_size)
    log = Log(args.output_dir, speaks=world.local_rank == 0, writes=world.rank == 0)
    try:
        code = work(args, world, device, log, stop)
    except Exception as error:
        raise world.fail(error)
    log.close()
    world.close()
    return code


def work(args, world, device, log, stop):
    """Build everything, then train and validate, or only validate. Returns the exit code."""
    check_same_flags(world, args)
    training, validation = build_sources(args, world, log)
    source = images.Folder if args.dummy else validation  # of the normalisation and the default size
    classes = [str(number) for number in range(1000)] if args.dummy else source.classes
    args.image_size = args.image_size or source.default_size
    identity = {'seed': args.seed, 'global batch': args.batch_size * args.nodes * args.accum_steps,
                'data': training.fingerprint if training is not None else 'dummy', 'image size': args.image_size}
    say_start(args, world, device, log, training, validation)

    device.seed(args.seed)
    network = vgg.VGG(args.arch, len(classes))
    state = world.broadcast(find_checkpoint(args, log) if world.rank == 0 else None)
    if state is not None:
        check_resumable(state, args, classes, identity)
        load_weights(network, weights_of(state, '--resume', averaged=args.evaluate), '--resume')
        if args.evaluate and 'state_dict_ema' in state:
            log.line('=> evaluating the averaged weights (--ema-decay)')
    elif args.pretrained:
        load_pretrained(network, args.pretrained, classes, world, log)
    if args.freeze_features:
        network.features.requires_grad_(False)
    preprocessing = {'image_size': args.image_size, 'crop': source.crop, 'mean': list(source.mean), 'std': list(source.std)}
    run = Run(args, world, device, log, stop, network, classes, make_normalise(source, device), identity, preprocessing,
              epoch=args.start_epoch, counts=Counts(device.device))
    validation_loader = None if validation is None else build_loader(validation, args, world, device, training=False)
    if args.evaluate:
        run.network, _ = device.place(network)
        run.epoch = max(0, int((state or {}).get('epoch', 1)) - 1)  # the last one trained
        answers = torch.zeros(2, len(validation), device=device.device) if args.report else None
        result = validate(run, validation_loader, answers)
        if result is None:
            return processes.STOPPED
        if args.report:
            write_report(run, validation, answers, result)
        return 0

    run.network, run.scaler = device.prepare_training(network, args)
    run.model = device.wrap_ddp(run.network, args.grad_compress) if world.world_size > 1 else run.network
    if args.compile:
        run.model = device.compile(run.model)
    if state is not None:
        restore(run, state)
        del state  # a gigabyte
    log.event('start', epoch=run.epoch, step=run.step)
    stop.training = True
    tracing = args.profile and world.rank == 0
    try:
        with device.trace(os.path.join(args.output_dir, 'trace.json'), log.line) if tracing else nullcontext() as run.trace:
            code = train(run, training, validation_loader)
    finally:
        warn_of_failed_save(run)  # a failure does not cost the checkpoint that is being written
    if code:
        log.line('=> stopped on a signal after step {}, and saved'.format(run.step))
    log.event('stop' if code else 'done', epoch=run.epoch, step=run.step, acc1=run.best_acc1)
    return code


def train(run, source, validation_loader):
    """All epochs that are left. Returns the exit code."""
    args = run.args
    start = run.epoch, run.step_in_epoch
    loader = DummyLoader(args, run.accelerator.device) if source is None \
        else build_loader(source, args, run.world, run.accelerator, training=True, start=start)
    batches, steps = iter(loader), loader.sampler.steps_per_epoch
    while run.epoch < args.epochs and not at_last_step(run):
        if run.step_in_epoch < steps and train_one_epoch(run, batches, steps):
            save(run, final=True)
            return 0 if at_last_step(run) else processes.STOPPED
        if run.world.world_size > 1:
            check_replicas(run.world, run.network)
        best = False
        if validation_loader is not None and ((run.epoch + 1) % args.eval_freq == 0 or run.epoch + 1 == args.epochs):
            with run.scaler.averages_in_place():
                result = validate(run, validation_loader)
            if result is None:
                save(run, final=True)
                return processes.STOPPED
            best = result[1] >= run.best_acc1
            run.best_acc1 = max(result[1], run.best_acc1)
            run.log.curves()
        run.epoch, run.step_in_epoch, run.counts = run.epoch + 1, 0, Counts(run.accelerator.device)
        save(run, best=best, final=run.epoch == args.epochs)
    return 0


def say_start(args, world, device, log, training, validation):
    """What this run is, in a few lines and in args.json."""
    counts = ['{:,} to {}'.format(len(source), verb) for source, verb in ((training, 'train on'), (validation, 'validate on'))
              if source is not None]
    log.line('=> {} on {} × {} ({}), {}, torch {}'.format(args.arch, world.world_size, args.device, device.name(),
                                                       args.precision, torch.__version__))
    log.line('=> images: {}, {}, {} pixels a side'.format(
        'synthetic' if args.dummy else args.data or 'the embedded digits (no --data given)', ', '.join(counts) or args.dummy,
        args.image_size))
    bad = [picture for source in (training, validation) if source is not None for picture in source.bad]
    if bad:
        path = os.path.join(args.output_dir, 'bad_images.txt')
        log.line('=> {:,} pictures cannot be read and are left out; {} names them'.format(len(bad), path))
        if world.rank == 0:
            with open(path, 'w', encoding='utf-8') as file:
                file.writelines('{}\t{}\n'.format(*picture) for picture in bad)
    if world.rank == 0 and not args.evaluate:
        record = {'flags': vars(args), 'torch': torch.__version__, 'python': platform.python_version(),
                  'device': device.name(), 'processes': world.world_size, 'commit': git_commit()}
        with open(os.path.join(args.output_dir, 'args.json'), 'w') as file:
            json.dump(record, file, indent=2, sort_keys=True)
            file.write('\n')


def write_report(run, source, answers, result):
    """The evaluation as a page, on rank 0. Each image has its answer on one process and zeros on the others."""
    import report  # Pillow and templates: only here
    args = run.args
    answers = np.array(run.world.sum(answers.flatten().tolist())).reshape(2, -1)
    if run.world.rank == 0:
        weights = args.resume or args.pretrained
        facts = dict(vars(args), weights=weights, data=args.data or 'the embedded digits', machine=run.accelerator.name(),
                     torch=torch.__version__, python=platform.python_version(), commit=git_commit())
        report.write(args.report, title='{}: {:.2f} % Acc@1'.format(args.arch, result[1]), source=source,
                     classes=run.classes, size=args.image_size, answers=answers, result=result, facts=facts,
                     training_folders=[os.path.dirname(weights) or '.', args.output_dir])
        run.log.line('=> the page: {}'.format(os.path.join(args.report, 'index.html')))


def make_output_folder(flag, folder):
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongUse('{} {}: cannot be written to ({})'.format(flag, folder, error.strerror))


def git_commit():
    """The commit of this program, or None outside a clone."""
    try:
        answer = subprocess.run(['git', '-C', HERE, 'rev-parse', 'HEAD'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # no git here
        return None
    return answer.stdout.decode().strip() or None


def main(argv=None):
    """Check everything that can be checked, then run here or in one process a device. Returns the exit code."""
    args = parse_args(argv)
    try:
        accelerator.choose(args)
        settle_processes(args)
        make_output_folder('--output-dir', args.output_dir)
        if args.report:
            make_output_folder('--report', args.report)
        if args.multiprocessing_distributed:
            return processes.spawn(main_worker, args, USER_ERRORS, count=args.processes,
                                   first_rank=args.rank * args.processes, world_size=args.nodes * args.processes)
        if processes.under_torchrun():
            processes.die_with(os.getppid())
        else:
            os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(args.nodes), LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')
        return main_worker(args)
    except USER_ERRORS as error:
        print('main.py: error: {}'.format(error), file=sys.stderr)
        return processes.exit_code(error)
    except Exception:  # a fault of the program: said, and left by os._exit below, which waits for no loader worker
        traceback.print_exc()
        return 1


if __name__ == '__main__':
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # without waiting for loader workers, or for peers that a failure has left behind
