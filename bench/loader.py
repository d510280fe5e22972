# SPDX-License-Identifier: BSD-3-Clause
"""Training pictures a second from JPEGs: our way, also after tools/shrink.py, torchvision's, and DALI's where installed.

    python bench/loader.py                                # 500×375, one core
    python bench/loader.py --width 2000 --height 1500 --count 24
    python bench/loader.py --workers 2                    # end to end, through the DataLoader into batches

The same generated pictures for all, RandomResizedCrop(224) and flip, one thread a core, in turn: A B A B …; the first turn
warms up and is left out; medians. The last line is JSON. Needs torch (1.7 with --workers), torchvision and simplejpeg, and
a C compiler for jpeg.c.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import accelerator  # noqa: E402  (before torch, see there)
import images  # noqa: E402
import jpeg  # noqa: E402
import main as program  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402


def photograph(width, height, seed):
    """Smooth structure at every scale with a little grain: (H, W, 3) uint8; its JPEG is as large as a photograph's."""
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


def stock_pipeline(root, size):
    from torchvision import datasets, transforms
    return datasets.ImageFolder(root, transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]))


def dali_pipeline(root, size, batch):
    """DALI's CPU pipeline as its ImageNet example has it (fused decode and crop, resize, crop-mirror-normalise)."""
    from nvidia.dali import fn, pipeline_def, types

    # Nothing ahead of time: DALI would work in its own threads while another contestant's clock runs.
    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, exec_dynamic=False, exec_async=False, exec_pipelined=False,
                  prefetch_queue_depth=1)
    def pipeline():
        files, labels = fn.readers.file(file_root=root, random_shuffle=False)
        crops = fn.decoders.image_random_crop(files, random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0])
        small = fn.resize(crops, resize_x=size, resize_y=size, interp_type=types.INTERP_TRIANGULAR)  # antialiased
        return fn.crop_mirror_normalize(
            small, mirror=fn.random.coin_flip(), mean=[0.485 * 255, 0.456 * 255, 0.406 * 255],
            std=[0.229 * 255, 0.224 * 255, 0.225 * 255]), labels

    made = pipeline()
    made.build()
    return made


def our_source(root):
    return images.Folder(root, resize=accelerator.antialiased_resize, decode_box=jpeg.load(images.cache_folder()))


def one_core(root, flags):
    """{name: a function of the turn's number that makes flags.count pictures}."""
    stock, source = stock_pipeline(root, flags.size), our_source(root)
    dataset = images.Dataset(source, size=flags.size, training=True)
    tool = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tools', 'shrink.py')
    subprocess.check_call([sys.executable, tool, root, root + '320'], stdout=subprocess.DEVNULL)
    smaller = images.Dataset(our_source(root + '320'), size=flags.size, training=True)
    contestants = {'stock': lambda turn: [stock[index] for index in range(flags.count)],
                   'ours': lambda turn: dataset[turn, range(flags.count)],
                   'ours, shrunk to 320': lambda turn: smaller[turn, range(flags.count)]}
    try:
        dali = dali_pipeline(root, flags.size, flags.count)
        contestants['dali'] = lambda turn: dali.run()
    except ImportError:
        pass  # "not measured" stands in the output
    return contestants


def end_to_end(root, flags):
    """The same with workers: batches as they reach the training loop."""
    stock_loader = DataLoader(stock_pipeline(root, flags.size), batch_size=flags.batch_size, shuffle=True, drop_last=True,
                              num_workers=flags.workers, persistent_workers=True, multiprocessing_context='fork')
    source = our_source(root)
    # An epoch a turn, so that nobody makes batches while the other's clock runs.
    our_loader = DataLoader(images.Dataset(source, size=flags.size, training=True, allocate=program.Buffers()),
                            batch_size=None, collate_fn=program.to_shared_memory, num_workers=flags.workers,
                            sampler=images.Batches(len(source), flags.batch_size, rank=0, world_size=1, shuffle=True),
                            persistent_workers=True, multiprocessing_context='fork')
    return {'stock': lambda turn: sum(1 for _ in stock_loader), 'ours': lambda turn: sum(1 for _ in our_loader)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--width', type=int, default=500)
    parser.add_argument('--height', type=int, default=375)
    parser.add_argument('--quality', type=int, default=97, help='of the JPEGs')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--count', type=int, default=150, help='pictures')
    parser.add_argument('--turns', type=int, default=7, help='counted turns of each')
    parser.add_argument('--workers', type=int, default=0, help='end to end with that many')
    parser.add_argument('--batch-size', type=int, default=32, help='end to end')
    flags = parser.parse_args()
    torch.set_num_threads(1)
    os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()
    with tempfile.TemporaryDirectory() as scratch:
        root = os.path.join(scratch, 'pictures')
        os.makedirs(os.path.join(root, 'a'))
        for number in range(flags.count):
            Image.fromarray(photograph(flags.width, flags.height, number)).save(
                os.path.join(root, 'a', '{}.jpg'.format(number)), quality=flags.quality)
        kilobytes = sum(os.path.getsize(os.path.join(root, 'a', name)) for name in os.listdir(os.path.join(root, 'a'))) / 1e3
        contestants = (end_to_end if flags.workers else one_core)(root, flags)
        pictures = flags.count // flags.batch_size * flags.batch_size if flags.workers else flags.count
        rates = {name: [] for name in contestants}
        for turn in range(flags.turns + 1):
            for name, load in contestants.items():
                begin = time.perf_counter()
                load(turn)
                if turn:
                    rates[name].append(pictures / (time.perf_counter() - begin))
    rounded = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratios = {name: round(statistics.median(ours / theirs for ours, theirs in zip(rates['ours'], rates[name])), 3)
              for name in rates if name != 'ours'}
    print(json.dumps({
        'pictures': '{}×{}, {:.0f} KB'.format(flags.width, flags.height, kilobytes / flags.count), 'torch': torch.__version__,
        'workers': flags.workers, 'decoder': 'jpeg.c' if jpeg.load(images.cache_folder()) else 'simplejpeg',
        'images_per_second': rounded, 'ours_to': ratios}, ensure_ascii=False))


if __name__ == '__main__':
    main()
