# SPDX-License-Identifier: BSD-3-Clause
"""Copy a dataset with smaller images, so that training decodes a fraction of the bytes.

    python tools/shrink.py /data/imagenet /data/imagenet320                     # short side 320 pixels
    python tools/shrink.py /data/imagenet /data/imagenet256 --short-side 256

The folder structure is kept. Every image becomes a JPEG of quality 95 (x.png becomes x.png.jpg), except JPEGs that are
small already: they are copied. Each file is first written under another name: after an interruption, the same command
continues. The EXIF orientation is kept. Unreadable images are named and left out; the exit code is then 1. Any other
error, such as a full disk, ends it with exit code 2. Files that training does not read are left out, too.

Training on the copy is not training on the originals: a small crop is enlarged from fewer pixels.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Counter, Tuple, Union

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import console
from engine.data.decoding import (
    EXIF_ORIENTATION,
    TRANSPOSITIONS,
    open_image,
    orientation_of,
    read_file,
    reason_of,
    to_rgb,
)
from engine.data.folder_index import EXTENSIONS, describe_left_out, kind_left_out, walk
from engine.data.layout import find_part
from engine.data.list_file import TRAIN, VAL
from engine.errors import UsageError, printable
from engine.parser import OneLineParser, nonempty_path, number

from PIL import Image

CHUNK = 32  # images per task
LANCZOS = 1
Outcome = Tuple[str, bool, Union[str, None]]  # path, whether its copy is new, why it cannot be read


def shrink(source: str, short_side: int) -> bytes:
    """Return a smaller image as a JPEG, or the file as it is. Raises whatever Pillow raises."""
    content = read_file(source)
    image = open_image(content)
    scale = min(1.0, short_side / min(image.size))
    width, height = (max(short_side, round(edge * scale)) for edge in image.size)
    if scale == 1.0 and image.format == "JPEG":
        image.load()  # a corrupt file is found now
        return content
    image.draft(None, (2 * width, 2 * height))  # decodes a JPEG at 1/2 or less if that is large enough
    smaller = to_rgb(image)
    if scale < 1.0:
        smaller = smaller.resize((width, height), LANCZOS)
    options, orientation = {}, orientation_of(image)  # Pillow has turned a TIFF already, and dropped its tag
    if orientation in TRANSPOSITIONS:
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = orientation
    encoded = io.BytesIO()
    smaller.save(encoded, format="JPEG", quality=95, **options)
    return encoded.getvalue()


def write(content: bytes, path: str) -> None:
    """Write a file, which is there only when it is whole. Raises UsageError."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{printable(path)}: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def find_images(source: str, target: str) -> list[tuple[str, str]]:
    """Return [(path, path of its copy)] of the images that training reads. Raises OSError, or UsageError without any.

    Each folder in `source` is walked on its own, so that val/ may be a link to train/.
    """
    root, pairs = os.fsencode(source), []
    left_out: Counter[str] = collections.Counter()
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not kind_left_out(entry.name, True)]
    # The images in `source` itself, then those of each folder.
    walks = [islice(walk(root, b"", left_out), 1), *(walk(root, folder, left_out) for folder in sorted(folders))]
    for _, _, images in chain(*walks):
        for name in map(os.fsdecode, images):
            copy = name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"
            pairs.append((os.path.join(source, name), os.path.join(target, copy)))
    what = describe_left_out(left_out) if left_out else ""
    if not pairs:
        kinds = " ".join(EXTENSIONS)
        raise UsageError(f"{printable(source)}: no images in it ({kinds}{what and '; '}{what})")
    if what:
        console.line(f"=> {printable(source)}: {what}")
    return pairs


def parse_args() -> argparse.Namespace:
    parser = OneLineParser("tools/shrink.py", (__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=nonempty_path, help="a folder of images, at any depth")
    parser.add_argument("target", type=nonempty_path, help="where the copy goes; outside the source")
    parser.add_argument(
        "--short-side", type=number(int, 32), default=320, metavar="N", help="pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=number(int, 1), default=os.cpu_count(), metavar="N", help="threads (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    """Copy the dataset. Returns 1 if some images could not be read, else 0."""
    args = parse_args()
    source, target = os.path.realpath(args.source), os.path.realpath(args.target)
    if not os.path.isdir(source):
        raise UsageError(f"{args.source}: no such folder")
    if (target + os.sep).startswith(source + os.sep):
        raise UsageError(f"{args.target} is inside {args.source}: name a folder outside it")
    try:
        pairs = find_images(source, target)
        for folder in {os.path.dirname(copy) for _, copy in pairs}:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{printable(error.filename)}: {error.strerror}") from error

    def work(first: int) -> list[Outcome]:
        results: list[Outcome] = []
        for path, copy in pairs[first : first + CHUNK]:
            if os.path.exists(copy):
                results.append((path, False, None))
                continue
            try:
                content = shrink(path, args.short_side)
            except Exception as error:  # Pillow raises nearly any type for a corrupt file
                if MemoryError in (type(error), type(error.__cause__)):
                    raise UsageError(f"{printable(path)}: not enough memory: use fewer --workers") from error
                results.append((path, False, reason_of(error)))
            else:
                write(content, copy)
                results.append((path, True, None))
        return results

    written = existing = unreadable = 0
    begin = time.perf_counter()
    with console.progress(len(pairs), 0, "Images"), ThreadPoolExecutor(args.workers) as threads:
        for chunk in threads.map(work, range(0, len(pairs), CHUNK)):  # Pillow works without Python's lock
            console.advance(len(chunk))
            for path, is_new, problem in chunk:
                if problem is not None:
                    unreadable += 1
                    console.warning(f"{printable(path)}: left out ({problem})")
                elif is_new:
                    written += 1
                else:
                    existing += 1
    seconds = time.perf_counter() - begin
    line = f"images written in {seconds:.0f} s: {written}; there already: {existing}; could not be read: {unreadable}"
    renamed = any(os.path.basename(path) != os.path.basename(copy) for path, copy in pairs)
    if renamed and not find_part(source, [*TRAIN, *VAL]):
        line += "; not all names are as before, so --val-split splits the copy differently: evaluate on the copy"
    console.line(line)
    return 1 if unreadable else 0


if __name__ == "__main__":
    console.run_script(main)
