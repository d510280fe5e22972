# SPDX-License-Identifier: BSD-3-Clause
"""The files of an image folder, listed once and cached in three arrays.

A list of ImageNet's 1.28 million paths would take 150 MB in every process, and DataLoader workers would copy it page by
page as reference counts change. The arrays are memory-mapped from a file in the user's cache folder, so a later start
does not list the files again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List

from engine import console
from engine.data.transforms import read_file, read_rgb, reason_of
from engine.errors import DataError, printable

import numpy as np

FORMAT = 2  # part of the cache file's name: raise it if other files are listed, or if the layout changes
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
SETTLING_SECONDS = 2  # a folder changed this shortly before it was listed may change again with the same time stamp
CHUNK = 64  # images that a thread checks at a time

Folders = List[List[Any]]  # [name below the root, modification time in ns]

# labels: (N,) int64. names: the paths below the root, one after the other: uint8. ends: (N + 1,) int64, where they end.
# header: JSON, with the rest and with what tells whether the index is out of date.
Parts = Dict[str, Any]


class FolderIndex:
    """The images of a folder: classes, labels, fingerprint, and unreadable: (path, reason) of the images left out."""

    def __init__(self, root: str, parts: Parts) -> None:
        header = json.loads(bytes(parts["header"]).decode())
        self.labels, self._ends, self._names = (np.asarray(parts[name]) for name in ("labels", "ends", "names"))
        self.root, self.header = os.fsencode(root), header
        self.classes: list[str] = header["classes"]
        self.fingerprint: str = header["fingerprint"]
        self.unreadable = [(printable(os.path.join(root, name)), reason) for name, reason in header["bad"]]

    def name(self, index: int) -> bytes:
        """Return the path of an image relative to the folder."""
        return self._names[self._ends[index] : self._ends[index + 1]].tobytes()

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.name(index)))

    def is_current(self) -> bool:
        """Whether the folder is still as it was listed. Raises KeyError if this is no index."""
        settled = (self.header["scanned"] - SETTLING_SECONDS) * 1e9
        return (
            self.header["root"] == os.path.realpath(os.fsdecode(self.root))
            and all(_stamp(self.root, name)[0] == time and time <= settled for name, time in self.header["folders"])
            and all(_stamp(self.root, name) == old for (name, _), old in zip(self.header["bad"], self.header["stamps"]))
        )


def open_index(root: str, skip_unreadable: bool = False) -> FolderIndex:
    """Return the index of a folder: the cached one unless a folder in it has changed, else a new one.

    skip_unreadable: leaves unreadable images out. Raises DataError if the folder is missing or has no classes, or if a
    class is empty.
    """
    path = _cache_path(root, checked=skip_unreadable)
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # not there, or damaged
        index = _load(path, root)
        if index.is_current():
            return index
    begin = time.time()
    try:
        folders, classes, images = _list_folder(root)
    except OSError as error:
        raise DataError(f"{printable(error.filename or root)}: {error.strerror}") from error
    unreadable = _find_unreadable(root, images) if skip_unreadable else {}
    parts = _build(root, begin, folders, classes, images, unreadable)
    del images
    # If there is no place for the cache, the next start lists the files again. NumPy's records end at 2 GiB.
    with contextlib.suppress(OSError, ValueError):
        _save(path, parts)
        return _load(path, root)
    return FolderIndex(root, parts)


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_path(root: str, checked: bool) -> str:
    """The cache file of a folder: in the user's cache folder, never among the data."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return os.path.join(cache, "vgg16", f"{name}{'-checked' if checked else ''}.index{FORMAT}.npy")


def _load(path: str, root: str) -> FolderIndex:
    return FolderIndex(root, np.load(path, mmap_mode="r")[0])


def _save(path: str, parts: Parts) -> None:
    """Write the arrays as one record of a .npy file, so that one rename completes them."""
    record = np.zeros(1, [(name, part.dtype, part.shape) for name, part in parts.items()])
    for name, part in parts.items():
        record[name] = part
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, record)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise


def _stamp(root: bytes, name: str) -> list[int]:
    """[modification time in ns, size], or [0, 0] if there is nothing."""
    try:
        status = os.stat(os.path.join(root, os.fsencode(name)))
    except OSError:
        return [0, 0]
    return [status.st_mtime_ns, status.st_size]


# --- a new index ------------------------------------------------------------------------------------------------------


def _list_folder(root: str) -> tuple[Folders, list[str], list[list[bytes]]]:
    """Return (folders, classes, the images of each class relative to root)."""
    folders: Folders = [["", _stamp(os.fsencode(root), "")[0]]]
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise DataError(f"{printable(root)}: no classes in it (expected one folder per class)")
    return folders, classes, [_walk(os.fsencode(root), os.fsencode(name), folders) for name in classes]


def _walk(root: bytes, name: bytes, folders: Folders) -> list[bytes]:
    """Return the images below root/name relative to root, in the order of torchvision's ImageFolder.

    Follows links, but enters each folder once, so that a loop of links ends. Adds each folder to `folders`.
    """
    found, pending, seen = [], [name], set()
    while pending:
        folder = pending.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append([os.fsdecode(folder), status.st_mtime_ns])
        images = []
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            if entry.is_dir():
                pending.append(os.path.join(folder, entry.name))
            elif os.fsdecode(entry.name).lower().endswith(EXTENSIONS):
                images.append(os.path.join(folder, entry.name))
        found.append((os.fsdecode(folder), sorted(images, key=os.fsdecode)))
    return [image for _, images in sorted(found) for image in images]


def _find_unreadable(root: str, images: list[list[bytes]]) -> dict[bytes, str]:
    """Read each image once, in one thread per core. Returns {name: reason} of those that cannot be read."""
    names = [name for group in images for name in group]

    def check(first: int) -> dict[bytes, str]:
        bad = {}
        for name in names[first : first + CHUNK]:
            try:
                read_rgb(read_file(os.path.join(os.fsencode(root), name)))
            except Exception as error:  # Pillow raises nearly any type for a corrupt file
                bad[name] = reason_of(error)
        return bad

    console.line(f"=> checking {len(names):,} images, once")
    unreadable: dict[bytes, str] = {}
    with console.progress(len(names), 0, "Checking"), ThreadPoolExecutor(os.cpu_count()) as threads:
        for bad in threads.map(check, range(0, len(names), CHUNK)):  # Pillow decodes without Python's lock
            unreadable.update(bad)
            console.advance(CHUNK)
    return unreadable


def _build(
    root: str,
    begin: float,
    folders: Folders,
    classes: list[str],
    images: list[list[bytes]],
    unreadable: dict[bytes, str],
) -> Parts:
    """Return the index of the images that are readable."""
    images = [[name for name in group if name not in unreadable] for group in images]
    for name, group in zip(classes, images):
        if not group:
            what = "no readable image" if unreadable else "no images"
            raise DataError(f"{printable(os.path.join(root, name))}: {what} in it ({' '.join(EXTENSIONS)})")
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in images])
    ends = np.cumsum([0] + [len(name) for group in images for name in group], dtype=np.int64)
    names = b"".join(name for group in images for name in group)
    bad = [[os.fsdecode(name), reason] for name, reason in unreadable.items()]
    header = {
        "root": os.path.realpath(root),
        "scanned": begin,
        "folders": folders,
        "classes": classes,
        "bad": bad,
        # Repairing a file does not change its folder's time stamp, so the stamps of unreadable files are kept too.
        "stamps": [_stamp(os.fsencode(root), name) for name, _ in bad],
        "fingerprint": hashlib.sha256(names + ends.tobytes() + labels.tobytes()).hexdigest(),
    }
    columns = [np.frombuffer(text, np.uint8) for text in (names, json.dumps(header).encode())]
    return {"ends": ends, "labels": labels, "names": columns[0], "header": columns[1]}
