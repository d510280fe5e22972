# SPDX-License-Identifier: BSD-3-Clause
"""Images a second of the training step: main.py's own, the recipe of pytorch/examples, and timm's where it is installed.

    python bench/step.py --device cpu --batch-size 16
    python bench/step.py --device gpu --batch-size 256 --steps 20

Synthetic images at 224 pixels. Each contestant runs in a process of its own (memory settings are a process's), one at a
time in turn: A B C A B C …; the first turn warms up and is left out; medians. The last line is JSON. Needs torch and
torchvision.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
GFLOP_AN_IMAGE = 92.65  # VGG16 at 224: 15.47 GMAC forward, the same twice over backward, 2 operations a MAC
CONTESTANTS = ['examples', 'ours', 'ours --amp', 'ours --amp --opt-level O2', 'ours --amp --compile', 'timm --amp',
               'timm --amp --torchcompile']


# --- the contestants: each returns a function that makes one step ----------------------------------------------------

def examples(flags):
    """pytorch/examples' imagenet/main.py: fp32, torch's default layout and SGD, loss and accuracy read at each step."""
    import torch
    import torchvision
    device = torch.device({'gpu': 'cuda'}.get(flags.device, flags.device))
    model = torchvision.models.vgg16().to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(flags.batch_size, 3, 224, 224, device=device)
    target = torch.randint(0, 1000, (flags.batch_size,), device=device)

    def step():
        output = model(images)
        loss = criterion(output, target)
        _, best = output.topk(5, 1)
        hits = best.eq(target[:, None])
        loss.item(), hits[:, :1].sum().item(), hits.sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def ours(flags, extra):
    """The step of main.py's train_one_epoch, by its own functions."""
    import accelerator
    import images
    import main
    import vgg
    from metrics import Counts
    args = main.parse_args(['--device', flags.device, '-b', str(flags.batch_size)] + extra)
    accelerator.choose(args)
    main.settle_processes(args)
    args.image_size = 224
    args.dummy = flags.batch_size
    device = accelerator.Accelerator(args, args.device_list[0], processes=1)
    device.seed(args.seed)
    model, scaler = device.prepare_training(vgg.VGG('vgg16', 1000), args)
    model = device.compile(model) if args.compile else model
    normalise, counts = main.make_normalise(images.Folder, device), Counts(device.device)
    batches = iter(main.DummyLoader(args, device.device))

    def step():
        pictures, target = next(batches)
        with device.autocast():
            logits = model(normalise(pictures))
            loss = main.cross_entropy(logits, target)
        scaler.backward(loss)
        counts.update(loss * len(target), logits, target)
        scaler.step()
    return step


def timm(flags, extra):
    """timm's vgg16 as its train.py runs it with --amp --amp-dtype bfloat16 --channels-last, and --torchcompile where asked."""
    import timm as library
    import torch
    device = torch.device({'gpu': 'cuda'}.get(flags.device, flags.device))
    model = library.create_model('vgg16').to(device, memory_format=torch.channels_last)
    model = torch.compile(model) if '--torchcompile' in extra else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    images = torch.randn(flags.batch_size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (flags.batch_size,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def work(name, flags):
    """One contestant: for each line read, make that many steps and answer with the seconds and the peak memory."""
    import resource
    contestant, *extra = name.split()
    step = examples(flags) if contestant == 'examples' else {'ours': ours, 'timm': timm}[contestant](flags, extra)
    import torch
    on_gpu = flags.device == 'gpu'
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize()
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({'seconds': seconds, 'peak_bytes': peak}), flush=True)


def matrix_rate(device, dtype):
    """GFLOP/s of a 4096³ matrix product at its best: what the chip can do for this format.

    The best of several, after the first have warmed threads and memory, by torch.mm and as a 1×1 convolution: on a GPU only
    convolutions take TF32 for fp32 unless told otherwise, and those are nearly all of the step.
    """
    import accelerator
    import torch
    device = torch.device({'gpu': 'cuda'}.get(device, device))
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    if device.type == 'cpu':
        accelerator.keep_freed_memory()
        torch.set_num_threads(accelerator.available_cores())
    first, second = torch.randn(2, 4096, 4096, device=device).to(dtype)
    maps = first.view(64, 64, 1, 4096).permute(2, 3, 0, 1)  # (1, 4096, 64, 64), channels last
    best = 0
    with torch.no_grad():
        for product in (lambda: torch.mm(first, second), lambda: torch.conv2d(maps, second[:, :, None, None])):
            for _ in range(5):
                begin = time.perf_counter()
                product()
                synchronize()
                best = max(best, 2 * 4096 ** 3 / (time.perf_counter() - begin) / 1e9)
    return best


def main_bench():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'gpu'])
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--steps', type=int, default=3, help='steps a turn')
    parser.add_argument('--turns', type=int, default=5, help='counted turns of each')
    parser.add_argument('--only', nargs='+', default=CONTESTANTS, metavar='NAME', help='of: ' + ', '.join(CONTESTANTS))
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags.worker, flags)

    workers = {}
    for name in flags.only:
        if name.startswith('timm') and subprocess.call([sys.executable, '-c', 'import timm'], stderr=subprocess.DEVNULL):
            print('timm is not installed: left out')
            continue
        workers[name] = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), '--worker', name, '--device', flags.device, '--batch-size',
             str(flags.batch_size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
    turns = {name: [] for name in workers}
    for turn in range(flags.turns + 1):
        for name, worker in workers.items():
            print(flags.steps, file=worker.stdin, flush=True)
            answer = '=>'
            while answer.startswith('=>'):  # notices of main.py
                answer = worker.stdout.readline()
            if turn:
                turns[name].append(json.loads(answer))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    import torch
    rates = {'fp32': matrix_rate(flags.device, torch.float32), 'bf16': matrix_rate(flags.device, torch.bfloat16)}
    print('torch {}, {}, batch {}; 4096³ matrix product: fp32 {:.0f}, bf16 {:.0f} GFLOP/s'.format(
        torch.__version__, flags.device, flags.batch_size, rates['fp32'], rates['bf16']))
    print('{:28s} {:>9s} {:>9s} {:>7s} {:>9s} {:>9s}'.format('', 'images/s', 'GFLOP/s', 'share', 'peak GiB', 'ratio'))
    result, first = {}, None
    for name, answers in turns.items():
        images_per_second = statistics.median(flags.batch_size * flags.steps / answer['seconds'] for answer in answers)
        first = first or [answer['seconds'] for answer in answers]
        ratio = statistics.median(one / answer['seconds'] for one, answer in zip(first, answers))
        gflops = images_per_second * GFLOP_AN_IMAGE
        share = gflops / rates['bf16' if '--amp' in name else 'fp32']
        peak = max(answer['peak_bytes'] for answer in answers)
        print('{:28s} {:9.2f} {:9.0f} {:6.0f}% {:9.2f} {:8.2f}×'.format(
            name, images_per_second, gflops, 100 * share, peak / 2 ** 30, ratio))
        result[name] = {'images_per_second': images_per_second, 'gflops': gflops, 'share_of_matrix_rate': share,
                        'peak_bytes': peak, 'ratio_to_first': ratio}
    print(json.dumps({'torch': torch.__version__, 'device': flags.device, 'batch_size': flags.batch_size,
                      'matrix_gflops': rates, 'results': result}))
    return None


if __name__ == '__main__':
    main_bench()
