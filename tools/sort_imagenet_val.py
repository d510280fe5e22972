# SPDX-License-Identifier: BSD-3-Clause
"""Sort ImageNet's flat validation folder into one folder per class, as main.py reads it.

    python tools/sort_imagenet_val.py /data/imagenet/val /data/ILSVRC2012_devkit_t12
    python tools/sort_imagenet_val.py /data/imagenet/val LOC_val_solution.csv

The classes of the 50,000 images come from the development kit (ILSVRC2012_devkit_t12.tar.gz, unpacked; reading its
meta.mat needs scipy) or from the CSV of Kaggle's copy of ImageNet. Each file is moved by one rename: after an
interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.console import run_script
from engine.errors import UsageError, printable
from engine.parser import OneLineParser, nonempty_path


def classes_from_csv(path: str) -> dict[str, str]:
    """Return {file stem: class} of LOC_val_solution.csv: `ImageId,PredictionString`, the class first in the string."""
    with open(path, newline="") as file:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}


def classes_from_devkit(folder: str) -> dict[str, str]:
    """Return {file stem: class}: line n of the ground truth is the class number of image n."""
    from scipy.io import loadmat

    synsets = loadmat(os.path.join(folder, "data", "meta.mat"), squeeze_me=True)["synsets"]
    names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    with open(os.path.join(folder, "data", "ILSVRC2012_validation_ground_truth.txt")) as file:
        return {f"ILSVRC2012_val_{number:08d}": names[int(line)] for number, line in enumerate(file, 1)}


def sort(folder: str, classes: dict[str, str]) -> tuple[int, list[str]]:
    """Move the images directly in `folder`. Returns (number moved, names without a class)."""
    moved, unknown = 0, []
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        if extension.upper() != ".JPEG":
            continue
        if stem not in classes:
            unknown.append(name)
            continue
        target = os.path.join(folder, classes[stem])
        os.makedirs(target, exist_ok=True)
        os.rename(os.path.join(folder, name), os.path.join(target, name))
        moved += 1
    return moved, unknown


def parse_args() -> argparse.Namespace:
    parser = OneLineParser("tools/sort_imagenet_val.py", (__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=nonempty_path, help="the flat val/ folder")
    parser.add_argument("labels", type=nonempty_path, help="the folder of the development kit, or LOC_val_solution.csv")
    return parser.parse_args()


def main() -> int:
    """Sort the folder. Returns 1 if some images have no class, else 0."""
    args = parse_args()
    if not os.path.isdir(args.folder):
        raise UsageError(f"{args.folder}: no such folder")
    try:
        classes = (classes_from_devkit if os.path.isdir(args.labels) else classes_from_csv)(args.labels)
    except ImportError as error:
        raise UsageError("reading meta.mat needs scipy: pip install scipy, or use LOC_val_solution.csv") from error
    except (OSError, KeyError, ValueError, IndexError, AttributeError) as error:  # a row cut off has no string
        raise UsageError(f"{args.labels}: not the labels of ImageNet 2012 ({error!r})") from error
    try:
        moved, unknown = sort(args.folder, classes)
    except OSError as error:
        again = "run the same command again to continue"
        raise UsageError(f"{printable(error.filename)}: {error.strerror}; {again}") from error
    print(f"images moved: {moved}, classes: {len(set(classes.values()))}")
    if unknown:
        print(f"images without a class, which stay: {len(unknown)}, the first is {unknown[0]}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    run_script(main)
