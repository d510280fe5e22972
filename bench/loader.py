# SPDX-License-Identifier: BSD-3-Clause
"""Training pictures a second from JPEGs on one core: images.py's, and the stock torchvision pipeline's.

    python bench/loader.py                       # 500×375
    python bench/loader.py --width 2000 --height 1500 --count 24

The same generated pictures for both, one thread, in turn: A B A B …; the first turn warms up and is left out; medians. The
last line is JSON. Needs torch, torchvision and simplejpeg.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import accelerator  # noqa: E402  (before torch, see there)
import images  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


def photograph(width, height, seed):
    """Smooth structure at every scale with a little grain: its JPEG is as large as a photograph's, unlike noise's."""
    rng = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells < width:
        noise = Image.fromarray(rng.randint(0, 256, (cells * height // width + 1, cells, 3)).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), Image.BICUBIC), np.float32) / cells ** 0.8
        cells *= 2
    total -= total.min()
    total = total / total.max() * 235 + rng.normal(0, 3, (height, width, 1))
    return total.clip(0, 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--width', type=int, default=500)
    parser.add_argument('--height', type=int, default=375)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--count', type=int, default=150, help='pictures')
    parser.add_argument('--turns', type=int, default=7, help='counted turns of each')
    flags = parser.parse_args()
    torch.set_num_threads(1)
    from torchvision import datasets, transforms
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(os.path.join(root, 'a'))
        for number in range(flags.count):
            Image.fromarray(photograph(flags.width, flags.height, number)).save(
                os.path.join(root, 'a', '{}.jpg'.format(number)), quality=90)
        kilobytes = sum(os.path.getsize(os.path.join(root, 'a', name)) for name in os.listdir(os.path.join(root, 'a'))) / 1e3
        stock = datasets.ImageFolder(root, transforms.Compose([
            transforms.RandomResizedCrop(flags.size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]))
        source = images.Folder(root, accelerator.antialiased_resize)
        contestants = {'stock': lambda turn: [stock[index] for index in range(flags.count)],
                       'ours': lambda turn: images.Dataset(source, size=flags.size, training=True)[turn, range(flags.count)]}
        rates = {name: [] for name in contestants}
        for turn in range(flags.turns + 1):
            for name, load in contestants.items():
                begin = time.perf_counter()
                load(turn)
                if turn:
                    rates[name].append(flags.count / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(ours / stock for ours, stock in zip(rates['ours'], rates['stock']))
    print(json.dumps({'pictures': '{}×{}, {:.0f} KB'.format(flags.width, flags.height, kilobytes / flags.count),
                      'torch': torch.__version__, 'fast_path': images.simplejpeg is not None and accelerator.TORCH >= (2, 1),
                      'images_per_second_a_core': medians, 'ratio': ratio}, ensure_ascii=False))


if __name__ == '__main__':
    main()
