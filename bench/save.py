# SPDX-License-Identifier: BSD-3-Clause
"""How long saving VGG16's checkpoint (1.1 GB: weights and momentum) stalls training, and how long the whole save takes.

    python bench/save.py --folder DIR

main.py copies the state and continues while a thread writes; a blocking save would take as long as one that is waited
for. Medians without the first save, which touches the copy's memory for the first time. What the thread takes from the
steps meanwhile is not included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.checkpoints import CheckpointWriter
from engine.device import Amp, ComputeDevice, resolve_device

import vgg

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu", "npu"])
    parser.add_argument("--folder", default=".", help="where the file is written, and removed at the end")
    parser.add_argument("--turns", type=int, default=5, help="saves that count")
    args = parser.parse_args()
    amp, network = Amp(ComputeDevice(resolve_device(args.device)[0])), vgg.VGG("vgg16", 1000)
    amp.device.place(network)
    weights = amp.convert(network)
    optimizer = amp.optimizer(network, torch.optim.SGD(weights, lr=0.01, momentum=0.9), weights)
    writer = CheckpointWriter()
    stalls, saves = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for _ in range(args.turns + 1):
            begin = time.perf_counter()
            state = {"state_dict": optimizer.model_state_dict(), "optimizer": optimizer.optimizer_state_dict()}
            writer.save(state, os.path.join(folder, "checkpoint.pth.tar"))
            stalls.append(time.perf_counter() - begin)
            error = writer.wait()
            saves.append(time.perf_counter() - begin)
            if error is not None:
                raise SystemExit(f"{args.folder}: {error}")
    stall, save = statistics.median(stalls[1:]), statistics.median(saves[1:])
    share = statistics.median(part / whole for part, whole in zip(stalls[1:], saves[1:]))
    print(
        f"torch {torch.__version__}, {args.device}: training stalls for {stall:.2f} s of a save of {save:.2f} s: "
        f"{share:.0%}"
    )
    result = {"torch": torch.__version__, "device": args.device, "stall_seconds": stall, "save_seconds": save}
    print(json.dumps({**result, "share": share}))


if __name__ == "__main__":
    main()
