# SPDX-License-Identifier: BSD-3-Clause
"""Training images per second from JPEGs: ours, ours after tools/shrink.py, torchvision's; timm's, DALI's if installed.

    python bench/loader.py                                # generated 500×375 images, one core
    python bench/loader.py --width 2000 --height 1500 --count 24
    python bench/loader.py --workers 2 --count 640        # end to end, through the DataLoader into batches
    python bench/loader.py --data /data/imagenet/train    # a folder of your own: DIR/class/image
    python bench/loader.py --augmentations                # ours with each augmentation, one core

All load the same images with RandomResizedCrop(224) and flip, one thread per core, in turn: A B A B …; the first turn
warms up and is left out; medians. The last line is JSON. Requires torch (1.7 with --workers), torchvision, simplejpeg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import console
from engine.data import Augmentation, FileList, ImageBatches, ResumableBatchSampler, read_batches, worker_options
from engine.errors import UsageError

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

SIZE = 224
SHRINK = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools", "shrink.py")
Contestants = Dict[str, Callable[[int], Any]]  # name -> a function of the turn that loads all images once


def photo(width: int, height: int, seed: int) -> np.ndarray:
    """Smooth structure at every scale with a little grain: (H, W, 3) uint8; its JPEG is as large as a photo's."""
    rng = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells < width:
        noise = Image.fromarray(rng.randint(0, 256, (cells * height // width + 1, cells, 3)).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), 3), np.float32) / cells**0.8  # 3: bicubic
        cells *= 2
    total -= total.min()
    total = total / total.max() * 235 + rng.normal(0, 3, (height, width, 1))
    return total.clip(0, 255).astype(np.uint8)


def generate(root: str, args: argparse.Namespace) -> None:
    os.makedirs(os.path.join(root, "a"))
    for number in range(args.count):
        path = os.path.join(root, "a", f"{number}.jpg")
        Image.fromarray(photo(args.width, args.height, number)).save(path, quality=args.quality)


def link_subset(root: str, source: str, count: int) -> None:
    """Fill ROOT/a with links to `count` images spread evenly over a folder DIR/class/image. Raises UsageError."""
    if not os.path.isdir(source):
        raise UsageError(f"--data {source}: no such folder")
    os.makedirs(os.path.join(root, "a"))
    dataset = FileList.find([source])
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    for number, index in enumerate(chosen):
        path = os.path.abspath(dataset.name(index))
        os.symlink(path, os.path.join(root, "a", f"{number}{os.path.splitext(path)[1]}"))


def torchvision_dataset(root: str) -> Any:
    """The pipeline of pytorch/examples' imagenet script."""
    from torchvision import datasets, transforms

    return datasets.ImageFolder(
        root,
        transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        ),
    )


def timm_loader(root: str, batch_size: int, workers: int) -> Any:
    """The loader of timm's train.py on a CPU, with crop and flip alone."""
    from timm.data import ImageDataset, create_loader

    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "use_prefetcher": False}
    return create_loader(ImageDataset(root), (3, SIZE, SIZE), batch_size, is_training=True, color_jitter=0, **options)


def dali_pipeline(root: str, batch: int, threads: int) -> Any:
    """DALI's CPU pipeline as in its ImageNet example: fused decode and crop, resize, mirror, normalize."""
    from nvidia.dali import fn, pipeline_def, types

    # Nothing ahead of time: DALI would work in its own threads while another contestant's clock runs.
    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=None,
        exec_dynamic=False,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def pipeline() -> Any:
        files, labels = fn.readers.file(file_root=root, random_shuffle=False)
        crops = fn.decoders.image_random_crop(files, random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0])
        resized = fn.resize(crops, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_TRIANGULAR)  # antialiased
        images = fn.crop_mirror_normalize(
            resized,
            mirror=fn.random.coin_flip(),
            mean=[0.485 * 255, 0.456 * 255, 0.406 * 255],
            std=[0.229 * 255, 0.224 * 255, 0.225 * 255],
        )
        return images, labels

    built = pipeline()
    built.build()
    return built


def add_installed(contestants: Contestants, build: dict[str, Callable[[], Callable[[int], Any]]]) -> Contestants:
    """Add what `build` makes by name, except where its package is not installed."""
    for name, make in build.items():
        try:
            contestants[name] = make()
        except ImportError:
            print(f"{name} is not installed: left out")
    return contestants


def one_core(root: str, count: int) -> Contestants:
    """Datasets alone, in this process."""
    stock, ours = torchvision_dataset(root), ImageBatches(FileList.find([root]), Augmentation(SIZE))
    subprocess.check_call([sys.executable, SHRINK, root, f"{root}320"], stdout=subprocess.DEVNULL)
    shrunk = ImageBatches(FileList.find([f"{root}320"]), Augmentation(SIZE))
    indices = np.arange(count)
    contestants: Contestants = {
        "torchvision": lambda turn: [stock[index] for index in indices],
        "ours": lambda turn: ours[turn, indices],
        "ours, shrunk to 320": lambda turn: shrunk[turn, indices],
    }

    def timm() -> Callable[[int], Any]:
        dataset = timm_loader(root, 1, 0).dataset
        return lambda turn: [dataset[index] for index in indices]

    def dali() -> Callable[[int], Any]:
        pipeline = dali_pipeline(root, count, 1)
        return lambda turn: pipeline.run()

    return add_installed(contestants, {"timm": timm, "DALI": dali})


def each_augmentation(root: str, count: int) -> Contestants:
    """Our dataset with one augmentation at a time, in this process."""
    options: dict[str, dict[str, Any]] = {
        "ours": {},
        "--train-scale 256 512": {"train_scale": (256, 512)},
        "--color-shift": {"color_shift": True},
        "--auto-augment ta_wide": {"auto_augment": "ta_wide"},
        "--auto-augment ra": {"auto_augment": "ra"},
        "--auto-augment aa": {"auto_augment": "aa"},
        "--random-erasing 0.25": {"random_erasing": 0.25},
    }
    indices = np.arange(count)

    def load(batches: ImageBatches) -> Callable[[int], Any]:
        return lambda turn: batches[turn, indices]

    dataset = FileList.find([root])
    return {name: load(ImageBatches(dataset, Augmentation(SIZE, **values))) for name, values in options.items()}


def end_to_end(root: str, batch_size: int, workers: int) -> Contestants:
    """Batches through worker processes, as they reach the training loop. Each turn is an epoch of its own."""
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"}
    stock = DataLoader(torchvision_dataset(root), batch_size=batch_size, shuffle=True, drop_last=True, **options)
    dataset = FileList.find([root])
    sampler = ResumableBatchSampler(len(dataset), batch_size, rank=0, world_size=1, shuffle=True)
    batches: Any = ImageBatches(dataset, Augmentation(SIZE))
    ours = DataLoader(batches, batch_size=None, sampler=sampler, **worker_options(workers))  # type: ignore[arg-type]
    contestants: Contestants = {
        "torchvision": lambda turn: sum(1 for _ in stock),
        "ours": lambda turn: sum(1 for _ in read_batches(ours)),
    }

    def timm() -> Callable[[int], Any]:
        loader = timm_loader(root, batch_size, workers)
        return lambda turn: sum(1 for _ in loader)

    def dali() -> Callable[[int], Any]:
        pipeline = dali_pipeline(root, batch_size, workers)
        return lambda turn: [pipeline.run() for _ in range(len(dataset) // batch_size)]

    return add_installed(contestants, {"timm": timm, "DALI": dali})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="images of your own, DIR/class/image (default: generated)")
    parser.add_argument("--width", type=int, default=500, help="of generated images (default: %(default)s)")
    parser.add_argument("--height", type=int, default=375, help="(default: %(default)s)")
    parser.add_argument("--quality", type=int, default=97, help="of generated JPEGs (default: %(default)s)")
    parser.add_argument("--count", type=int, default=150, help="images (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns that count (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="end to end with this many (default: one core alone)")
    parser.add_argument("--augmentations", action="store_true", help="ours with each augmentation, one core")
    parser.add_argument("--batch-size", type=int, default=32, help="end to end (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        root = os.path.join(scratch, "images")
        if args.data:
            link_subset(root, args.data, args.count)
        else:
            generate(root, args)
        paths = [os.path.join(root, "a", name) for name in os.listdir(os.path.join(root, "a"))]
        kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1e3
        if args.workers:
            if len(paths) < args.batch_size:
                raise UsageError(f"--batch-size {args.batch_size} requires as many images, got {len(paths)}")
            contestants = end_to_end(root, args.batch_size, args.workers)
            images = len(paths) // args.batch_size * args.batch_size
        else:
            contestants = (each_augmentation if args.augmentations else one_core)(root, len(paths))
            images = len(paths)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(args.turns + 1):
            for name, load in contestants.items():
                begin = time.perf_counter()
                load(turn)
                if turn:
                    rates[name].append(images / (time.perf_counter() - begin))
    ratios = {
        name: round(statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates[name])), 3)
        for name in rates
        if name != "ours"
    }
    result = {
        "images": f"{args.data or f'{args.width}×{args.height}'}, {kilobytes:.0f} KB",
        "torch": torch.__version__,
        "workers": args.workers,
        "decoder": Augmentation.decoder,
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ours_relative_to": ratios,
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    console.run_script(main)
