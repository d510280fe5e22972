# SPDX-License-Identifier: BSD-3-Clause
"""Images per second of the training step: ours, those of pytorch/examples and torchvision, timm's if it is installed.

    python bench/step.py --device cpu --batch-size 16
    python bench/step.py --device gpu --batch-size 256 --steps 20

Synthetic images at 224 pixels. Each contestant runs in a process of its own, because memory settings are per process,
one at a time, in turn: A B C A B C …; the first turn warms up and is left out; medians. The last line is JSON. Requires
torch and torchvision.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.data import Preprocessing
from engine.device import Amp, ComputeDevice, resolve_precision
from engine.records import AccuracyCounter, cross_entropy

import vgg

import torch

GFLOP_PER_IMAGE = 92.65  # VGG16 at 224: 15.47 GMAC forward, twice that backward, 2 operations per MAC
CONTESTANTS = [
    "examples",
    "ours",
    "ours --amp",
    "ours --amp --opt-level O2",
    "ours --amp --compile",
    "torchvision --amp --channels-last",
    "timm --amp",
    "timm --amp --torchcompile",
]
TORCH_DEVICES = {"gpu": "cuda", "cpu": "cpu"}
Step = Callable[[], None]


# --- the contestants: each returns a function that makes one step -----------------------------------------------------


def examples(device_name: str, batch_size: int) -> Step:
    """pytorch/examples' imagenet/main.py: fp32, torch's default layout and SGD, loss and accuracy read at each step."""
    import torchvision

    device = torch.device(TORCH_DEVICES[device_name])
    model = torchvision.models.vgg16().to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    target = torch.randint(0, 1000, (batch_size,), device=device)

    def step() -> None:
        output = model(images)
        loss = criterion(output, target)
        _, top5 = output.topk(5, 1)
        correct = top5.eq(target[:, None])
        loss.item(), correct[:, :1].sum().item(), correct.sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(device_name: str, batch_size: int, flags: list[str]) -> Step:
    """What main.py's train_step does, from the same parts. flags: of main.py."""
    opt_level = flags[flags.index("--opt-level") + 1] if "--opt-level" in flags else "O1"
    precision = resolve_precision(device_name, [0], amp="--amp" in flags, opt_level=opt_level, amp_dtype="auto")
    device = ComputeDevice(device_name)
    amp = Amp(device, precision, opt_level)
    device.seed(49)
    model: torch.nn.Module = vgg.VGG("vgg16", 1000)
    device.place(model, one_shape=True)
    weights = amp.convert(model)
    sgd = torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=1e-4, **device.sgd_options())
    optimizer = amp.optimizer(model, sgd, weights)
    if "--compile" in flags:
        model = device.compile(model)
    normalize = device.normalizer(Preprocessing().mean, Preprocessing().std, amp.input_dtype)
    counter = AccuracyCounter(device.device)
    images = torch.randint(0, 256, (batch_size, 224, 224, 3), device=device.device).byte()
    target = torch.randint(0, 1000, (batch_size,), device=device.device)

    def step() -> None:
        with amp.autocast():
            logits = model(normalize(images))
            loss = cross_entropy(logits, target)
        optimizer.backward(loss)
        counter.update(loss, logits, target)
        optimizer.step()

    return step


def torchvision(device_name: str, batch_size: int, flags: list[str]) -> Step:
    """torchvision's references/classification/train.py: --amp is fp16 with a GradScaler, loss and accuracy are read at
    each step. --channels-last is not a flag of it, but a change that its users often make.
    """
    import torchvision as library

    torch.backends.cudnn.benchmark = True
    device, amp = torch.device(TORCH_DEVICES[device_name]), "--amp" in flags
    layout = torch.channels_last if "--channels-last" in flags else torch.contiguous_format
    model = library.models.vgg16().to(device, memory_format=layout)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    images = torch.randn(batch_size, 3, 224, 224, device=device).contiguous(memory_format=layout)
    target = torch.randint(0, 1000, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.float16, enabled=amp):
            output = model(images)
            loss = criterion(output, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct = output.topk(5, 1)[1].eq(target[:, None])
        loss.item(), correct[:, :1].sum().item(), correct.sum().item()

    return step


def timm(device_name: str, batch_size: int, flags: list[str]) -> Step:
    """timm's vgg16 as its train.py runs it with --amp --amp-dtype bfloat16 --channels-last, perhaps --torchcompile."""
    import timm as library

    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(TORCH_DEVICES[device_name])
    network = library.create_model("vgg16").to(device, memory_format=torch.channels_last)
    model = torch.compile(network) if "--torchcompile" in flags else network
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    images = torch.randn(batch_size, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# --- measuring --------------------------------------------------------------------------------------------------------


def work(name: str, device: str, batch_size: int) -> None:
    """Be one contestant: for each number read, make that many steps and print the seconds and the peak memory."""
    import resource

    contestant, *flags = name.split()
    if contestant == "examples":
        step = examples(device, batch_size)
    else:
        step = {"ours": ours, "torchvision": torchvision, "timm": timm}[contestant](device, batch_size, flags)
    synchronize: Step = torch.cuda.synchronize if device == "gpu" else lambda: None
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize()
        seconds = time.perf_counter() - begin
        if device == "gpu":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def matrix_rate(device_name: str, dtype: torch.dtype) -> float:
    """GFLOP/s of the best 4096³ matrix product: what the chip can do in this format.

    The best of several, by torch.mm and as a 1×1 convolution: on a GPU only convolutions take TF32 for fp32 unless told
    otherwise, and those are nearly all of the step.
    """
    device = torch.device(TORCH_DEVICES[device_name])
    synchronize: Step = torch.cuda.synchronize if device_name == "gpu" else lambda: None
    ComputeDevice(device_name)  # sets threads and memory as in training
    first, second = torch.randn(2, 4096, 4096, device=device).to(dtype)
    maps = first.view(64, 64, 1, 4096).permute(2, 3, 0, 1)  # (1, 4096, 64, 64), channels last
    products = (lambda: torch.mm(first, second), lambda: torch.conv2d(maps, second[:, :, None, None]))
    best = 0.0
    with torch.no_grad():
        for product in products:
            for _ in range(5):
                begin = time.perf_counter()
                product()
                synchronize()
                best = max(best, 2 * 4096**3 / (time.perf_counter() - begin) / 1e9)
    return best


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return {contestant: its seconds and peak memory, turn by turn}."""
    workers = {}
    for name in args.only:
        if name.startswith("torchvision --amp") and args.device == "cpu":
            print("torchvision's --amp is for GPUs only: left out")
            continue
        if name.startswith("timm") and subprocess.call(
            [sys.executable, "-c", "import timm"], stderr=subprocess.DEVNULL
        ):
            print("timm is not installed: left out")
            continue
        command = [sys.executable, os.path.abspath(__file__), "--worker", name, "--device", args.device]
        workers[name] = subprocess.Popen(
            [*command, "--batch-size", str(args.batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for turn in range(args.turns + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            print(args.steps, file=worker.stdin, flush=True)
            answer = "=>"
            while answer.startswith("=>"):  # notices
                answer = worker.stdout.readline()
            if turn:
                turns[name].append(json.loads(answer))
    for worker in workers.values():
        worker.communicate()
    return turns


def report(turns: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    rates = {
        name: matrix_rate(args.device, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    print(
        f"torch {torch.__version__}, {args.device}, batch {args.batch_size}; 4096³ matrix product: "
        f"fp32 {rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} GFLOP/s"
    )
    print(f"{'':28s} {'images/s':>9s} {'GFLOP/s':>9s} {'share':>7s} {'peak GiB':>9s} {'ratio':>9s}")
    results: dict[str, dict[str, float]] = {}
    first = [turn["seconds"] for turn in next(iter(turns.values()))]
    for name, measured in turns.items():
        seconds = [turn["seconds"] for turn in measured]
        rate = statistics.median(args.batch_size * args.steps / value for value in seconds)
        result = {
            "images_per_second": rate,
            "gflops": rate * GFLOP_PER_IMAGE,
            "share_of_matrix_rate": rate * GFLOP_PER_IMAGE / rates["bf16" if "--amp" in name else "fp32"],
            "peak_bytes": max(turn["peak_bytes"] for turn in measured),
            "ratio_to_first": statistics.median(one / value for one, value in zip(first, seconds)),
        }
        print(
            f"{name:28s} {rate:9.2f} {result['gflops']:9.0f} {result['share_of_matrix_rate']:7.0%} "
            f"{result['peak_bytes'] / 2**30:9.2f} {result['ratio_to_first']:8.2f}×"
        )
        results[name] = result
    summary = {"torch": torch.__version__, "device": args.device, "batch_size": args.batch_size}
    print(json.dumps({**summary, "matrix_gflops": rates, "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--only", nargs="+", default=CONTESTANTS, metavar="NAME", help=f"of: {', '.join(CONTESTANTS)}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.device, args.batch_size)
    else:
        report(measure(args), args)


if __name__ == "__main__":
    main()
