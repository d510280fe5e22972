# SPDX-License-Identifier: BSD-3-Clause
"""Sort ImageNet's flat validation folder into one folder a class, as main.py reads it.

    python tools/sort_imagenet_val.py /data/imagenet/val /data/ILSVRC2012_devkit_t12
    python tools/sort_imagenet_val.py /data/imagenet/val LOC_val_solution.csv

The classes of the 50,000 pictures come from the development kit (ILSVRC2012_devkit_t12.tar.gz, unpacked: its
ground truth numbers and the names in meta.mat need scipy) or from the CSV of Kaggle's copy of ImageNet. Files are moved,
one rename each; after an interruption the same command goes on.
"""
import argparse
import csv
import os
import sys


def classes_from_csv(path):
    """{file stem: class} of LOC_val_solution.csv: `ImageId,PredictionString`, the class first in the string."""
    with open(path, newline='') as file:
        return {row['ImageId']: row['PredictionString'].split()[0] for row in csv.DictReader(file)}


def classes_from_devkit(folder):
    """{file stem: class} of the development kit: line n of the ground truth is the number of picture n's class."""
    from scipy.io import loadmat
    synsets = loadmat(os.path.join(folder, 'data', 'meta.mat'), squeeze_me=True)['synsets']
    names = {int(synset['ILSVRC2012_ID']): str(synset['WNID']) for synset in synsets}
    with open(os.path.join(folder, 'data', 'ILSVRC2012_validation_ground_truth.txt')) as file:
        return {'ILSVRC2012_val_{:08d}'.format(number): names[int(line)] for number, line in enumerate(file, 1)}


def sort(folder, classes):
    """Move the pictures that lie directly in `folder`. Returns (moved, names that have no class)."""
    moved, unknown = 0, []
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        if extension.upper() != '.JPEG':
            continue
        if stem not in classes:
            unknown.append(name)
            continue
        target = os.path.join(folder, classes[stem])
        os.makedirs(target, exist_ok=True)
        os.rename(os.path.join(folder, name), os.path.join(target, name))
        moved += 1
    return moved, unknown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='the flat val/ folder')
    parser.add_argument('labels', help="the development kit's folder, or LOC_val_solution.csv")
    args = parser.parse_args()
    if not os.path.isdir(args.folder):
        parser.error('{}: no such folder'.format(args.folder))
    try:
        classes = (classes_from_devkit if os.path.isdir(args.labels) else classes_from_csv)(args.labels)
    except ImportError:
        parser.error('reading meta.mat needs scipy: pip install scipy, or use LOC_val_solution.csv')
    except (OSError, KeyError, ValueError, IndexError) as error:
        parser.error('{}: not the labels of ImageNet 2012 ({!r})'.format(args.labels, error))
    moved, unknown = sort(args.folder, classes)
    print('{} pictures moved into {} classes'.format(moved, len(set(classes.values()))))
    if unknown:
        print('{} pictures have no label, the first is {}: left where they are'.format(len(unknown), unknown[0]),
              file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
