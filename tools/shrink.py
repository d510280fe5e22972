# SPDX-License-Identifier: BSD-3-Clause
"""Copy a data set with its pictures made smaller, so that training decodes a fraction of the bytes.

    python tools/shrink.py /data/imagenet /data/imagenet320                     # the short side 320 pixels
    python tools/shrink.py /data/imagenet /data/imagenet256 --short-side 256

The tree stays as it is; every picture larger than that becomes a JPEG of quality 95 (x.png then is x.png.jpg), smaller
JPEGs are copied. Each file is written under another name first: after an interruption the same command goes on. Pictures
that cannot be read are named and left out; the exit code is then 1.

Training on the copy sees other pixels than training on the originals: an image cropped small is enlarged from less.
"""
import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import images  # noqa: E402
from PIL import Image  # noqa: E402

CHUNK = 32  # pictures to a task


def shrink(source, target, short_side):
    """Write one picture smaller, or copy it. Returns False where it was there already. Raises whatever Pillow raises."""
    if os.path.exists(target):
        return False
    with open(source, 'rb') as file:
        image = images.open_picture(file)
        scale = min(1.0, short_side / min(image.size))
        size = [max(short_side, round(edge * scale)) for edge in image.size]
        temporary = '{}.{}.tmp'.format(target, os.getpid())
        try:
            if scale == 1.0 and image.format == 'JPEG':
                image.load()  # a damaged one is named now
                shutil.copyfile(source, temporary)
            else:
                image.draft(None, [2 * edge for edge in size])  # a JPEG is decoded at a half or less where that is enough
                smaller = images.to_rgb(image)
                if scale < 1.0:
                    smaller = smaller.resize(size, Image.LANCZOS)
                smaller.save(temporary, format='JPEG', quality=95)
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    return True


def find_pictures(source, target):
    """[(path, path of its copy)] of every picture below `source`; makes the folders."""
    pairs = []
    for folder, _, names in os.walk(source, followlinks=True):
        copies = os.path.normpath(os.path.join(target, os.path.relpath(folder, source)))
        os.makedirs(copies, exist_ok=True)
        for name in sorted(names):
            if name.lower().endswith(images.EXTENSIONS):
                copy = name if name.lower().endswith(('.jpg', '.jpeg')) else name + '.jpg'
                pairs.append((os.path.join(folder, name), os.path.join(copies, copy)))
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', help='a folder of pictures, at any depth')
    parser.add_argument('target', help='where the copy goes; outside the source')
    parser.add_argument('--short-side', type=int, default=320, metavar='N', help='pixels (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), metavar='N', help='threads (default: %(default)s)')
    args = parser.parse_args()
    source, target = os.path.realpath(args.source), os.path.realpath(args.target)
    if not os.path.isdir(source):
        parser.error('{}: no such folder'.format(args.source))
    if (target + os.sep).startswith(source + os.sep):
        parser.error('{} lies in {}: name a folder outside it'.format(args.target, args.source))
    if args.short_side < 32 or args.workers < 1:
        parser.error('--short-side is at least 32 and --workers at least 1')

    try:
        pairs = find_pictures(source, target)
    except OSError as error:
        parser.error('{}: {}'.format(error.filename, error.strerror))

    def work(first):
        results = []
        for picture, copy in pairs[first:first + CHUNK]:
            try:
                results.append((picture, shrink(picture, copy, args.short_side), None))
            except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
                results.append((picture, False, images.reason_of(error)))
        return results

    written = there = bad = 0
    begin = time.perf_counter()
    with ThreadPoolExecutor(args.workers) as threads:  # Pillow works without Python's lock
        results = (result for chunk in threads.map(work, range(0, len(pairs), CHUNK)) for result in chunk)
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
                results = tqdm(results, total=len(pairs), unit='picture', dynamic_ncols=True)
            except ImportError:
                print('{} pictures; pip install tqdm shows the progress'.format(len(pairs)), file=sys.stderr)
        for picture, is_new, problem in results:
            written, there, bad = written + is_new, there + (not is_new and problem is None), bad + (problem is not None)
            if problem is not None:
                print('{}: left out ({})'.format(images.shown(picture), problem), file=sys.stderr)
    print('{} pictures written in {:.0f} s, {} were there already, {} could not be read'.format(
        written, time.perf_counter() - begin, there, bad))
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
