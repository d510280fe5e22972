# SPDX-License-Identifier: BSD-3-Clause
"""How long a save of VGG16's checkpoint (1.1 GB: weights and momentum) stops training, and how long the whole save takes.

    python bench/save.py --folder DIR

main.py copies the state and goes on while a thread writes; a save that is waited for is what a blocking one costs. Medians,
the first left out: it touches the memory of the copy for the first time. What the thread takes from the steps meanwhile is
not in the figure. The last line is JSON.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import accelerator  # noqa: E402
import checkpoint  # noqa: E402
import main  # noqa: E402
import torch  # noqa: E402
import vgg  # noqa: E402


def main_bench():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'gpu', 'npu'])
    parser.add_argument('--folder', default='.', help='where the file is written, and removed at the end')
    parser.add_argument('--turns', type=int, default=5, help='saves that count')
    flags = parser.parse_args()
    args = main.parse_args(['--device', flags.device])
    accelerator.choose(args)
    device = accelerator.Accelerator(args, args.device_list[0], processes=1)
    model, scaler = device.prepare_training(vgg.VGG('vgg16', 1000), args)
    writer, stalls, saves = checkpoint.Writer(), [], []
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        for _ in range(flags.turns + 1):
            begin = time.perf_counter()
            state = {'state_dict': scaler.model_state_dict(model), 'optimizer': scaler.optimizer_state_dict()}
            writer.save(state, os.path.join(folder, 'checkpoint.pth.tar'))
            stalls.append(time.perf_counter() - begin)
            error = writer.wait()
            saves.append(time.perf_counter() - begin)
            if error is not None:
                raise SystemExit('{}: {}'.format(flags.folder, error))
    stall, save = statistics.median(stalls[1:]), statistics.median(saves[1:])
    share = statistics.median(part / whole for part, whole in zip(stalls[1:], saves[1:]))
    print('torch {}, {}: training stands still for {:.2f} s of a save of {:.2f} s: {:.0f} %'.format(
        torch.__version__, flags.device, stall, save, 100 * share))
    print(json.dumps({'torch': torch.__version__, 'device': flags.device, 'stall_seconds': stall, 'save_seconds': save,
                      'share': share}))


if __name__ == '__main__':
    main_bench()
