# SPDX-License-Identifier: BSD-3-Clause
"""Seconds per image of each evaluation view of VGG16, against the center crop.

    python bench/views.py                                 # one image of 256×341 pixels, fp32, on a CPU
    python bench/views.py --device gpu --batch-size 32 --amp

The views take turns: A B C D A B C D …; the first turn warms up and is left out; medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.data import Preprocessing
from engine.device import Amp, ComputeDevice, resolve_device, resolve_precision
from engine.evaluation import VIEWS, ViewAverage

import vgg

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="npu, gpu or cpu (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--scales", type=int, nargs="+", default=[256], help="short sides (default: 256)")
    parser.add_argument("--turns", type=int, default=3, help="turns that count (default: %(default)s)")
    args = parser.parse_args()
    device, _ = resolve_device(args.device)
    precision = resolve_precision(device, [0], amp=args.amp, opt_level="O1", amp_dtype="auto")
    amp = Amp(ComputeDevice(device), precision)
    network = vgg.VGG("vgg16").eval().requires_grad_(False)
    amp.device.place(network)
    normalize = amp.device.normalizer(Preprocessing().mean, Preprocessing().std)
    groups = [
        (
            torch.arange(args.batch_size),
            torch.randint(0, 256, (args.batch_size, scale, scale * 4 // 3, 3), dtype=torch.uint8),
        )
        for scale in args.scales
    ]
    seconds: dict[str, list[float]] = {view: [] for view in VIEWS}
    for turn in range(args.turns + 1):
        for view in VIEWS:
            predict = ViewAverage(network, normalize, view=view, size=224, mirrored=True)
            begin = time.perf_counter()
            with amp.autocast():
                predict(groups)
            amp.device.synchronize()
            if turn:
                seconds[view].append((time.perf_counter() - begin) / args.batch_size)
    center = seconds["center"]
    result = {
        "scales": args.scales,
        "torch": torch.__version__,
        "hardware": amp.device.name(),
        "precision": precision,
        "seconds_per_image": {view: round(statistics.median(values), 4) for view, values in seconds.items()},
        "times_center": {
            view: round(statistics.median(value / base for value, base in zip(values, center)), 2)
            for view, values in seconds.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
