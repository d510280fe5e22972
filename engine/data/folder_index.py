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
from typing import Any, Callable, Iterable, Iterator

from engine import console
from engine.data.images import read_rgb, reason_of
from engine.errors import DataError, printable

import numpy as np

FORMAT = 1  # part of the cache file's name: raise it if other files are listed, or if the layout changes
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
SETTLING_SECONDS = 2  # a folder changed this shortly before it was listed may change again with the same time stamp

# Reads every image of a new index once: passes (iterator of reasons, None if readable; count) on, with a progress bar.
Check = Callable[[Iterable["str | None"], int], Iterable["str | None"]]


class FolderIndex:
    """The images of a folder.

    Attributes:
        classes: names of the classes.
        labels: (N,) int64.
        fingerprint: SHA-256 of names and labels.
        unreadable: [name, reason] of the images left out.
    """

    def __init__(
        self, root: str, header: dict[str, Any], offsets: np.ndarray, labels: np.ndarray, names: np.ndarray
    ) -> None:
        self.root, self.labels, self._offsets, self._names = os.fsencode(root), labels, offsets, names
        self.classes: list[str] = header["classes"]
        self.fingerprint: str = header["fingerprint"]
        self.unreadable: list[list[str]] = header["bad"]

    def name(self, index: int) -> bytes:
        """Return the path of an image relative to the folder."""
        return self._names[self._offsets[index] : self._offsets[index + 1]].tobytes()

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.name(index)))


def open_index(root: str, check: Check | None = None) -> FolderIndex:
    """Return the index of a folder: the cached one unless a folder in it has changed, else a new one.

    check: leaves unreadable images out. Raises DataError.
    """
    path = _cache_path(root, checked=check is not None)
    index = _load(path, root)
    if index is None:
        begin = time.time()
        try:
            folders, classes, names, labels = _list_folder(root)
        except OSError as error:
            raise DataError(f"{printable(error.filename or root)}: {error.strerror}") from error
        unreadable = _find_unreadable(root, names, check) if check is not None else {}
        parts = _build(root, folders, classes, names, labels, unreadable, begin)
        del names, labels
        index = FolderIndex(root, *parts)
        with contextlib.suppress(OSError):  # if there is no place for the cache, the next start lists the files again
            _write(path, *parts)
            index = _load(path, root) or index
    return index


def track_check(reasons: Iterable[str | None], count: int) -> Iterator[str | None]:
    """Pass the results of checking `count` images on, with a progress bar (a Check)."""
    console.line(f"=> checking {count:,} images, once")
    with console.progress(count, 0, "Checking"):
        for reason in reasons:
            console.advance(1)
            yield reason


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_path(root: str, checked: bool) -> str:
    """The cache file of a folder: in the user's cache folder, never among the data."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return os.path.join(cache, "vgg16", f"{name}{'-checked' if checked else ''}.index{FORMAT}")


def _load(path: str, root: str) -> FolderIndex | None:
    """Return a cached index, or None if there is none or it is out of date."""

    def stamp_of(name: str) -> list[int]:
        return _stamp(os.path.join(os.fsencode(root), os.fsencode(name)))

    try:
        with open(path, "rb") as file:
            line = file.readline()
        header = json.loads(line.decode())
        if header["root"] != os.path.realpath(root):
            return None
        settled = (header["scanned"] - SETTLING_SECONDS) * 1e9
        for name, changed in header["folders"]:
            if stamp_of(name)[0] != changed or changed > settled:
                return None
        if any(stamp_of(name) != stamp for (name, _), stamp in zip(header["bad"], header["stamps"])):
            return None
        content = np.memmap(path, np.uint8, "r")[len(line) :]
        if len(content) != 16 * header["count"] + 8 + header["bytes"]:
            return None
        offsets, labels, names = np.split(content, [header["count"] * 8 + 8, header["count"] * 16 + 8])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged
        return None
    return FolderIndex(root, header, offsets.view(np.int64), labels.view(np.int64), names)


def _write(path: str, header: dict[str, Any], offsets: np.ndarray, labels: np.ndarray, names: np.ndarray) -> None:
    """Write one line of JSON, padded to a multiple of 8 bytes, and the arrays."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 8) + b"\n"
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(line)
            for array in (offsets, labels, names):
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise


def _stamp(path: bytes) -> list[int]:
    """[modification time in ns, size], or [0, 0] if there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_mtime_ns, status.st_size]


# --- a new index ------------------------------------------------------------------------------------------------------


def _list_folder(root: str) -> tuple[list[list[Any]], list[str], list[bytes], list[int]]:
    """Return ([[folder, modification time in ns]], classes, names relative to root, labels)."""
    folders: list[list[Any]] = [["", _stamp(os.fsencode(root))[0]]]
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise DataError(f"{printable(root)}: no classes in it (expected one folder per class)")
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _walk(os.fsencode(root), os.fsencode(name), folders)
        names += found
        labels += [label] * len(found)
    return folders, classes, names, labels


def _walk(root: bytes, name: bytes, folders: list[list[Any]]) -> list[bytes]:
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


def _find_unreadable(root: str, names: list[bytes], check: Check) -> dict[int, str]:
    """Read each image once, in one thread per core. Returns {position: reason} of those that cannot be read."""
    chunk = 64  # images per task

    def read(first: int) -> list[str | None]:
        reasons: list[str | None] = []
        for name in names[first : first + chunk]:
            try:
                read_rgb(os.path.join(os.fsencode(root), name))
                reasons.append(None)
            except Exception as error:  # Pillow raises nearly any type for a corrupt file
                reasons.append(reason_of(error))
        return reasons

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        reasons = (reason for part in threads.map(read, range(0, len(names), chunk)) for reason in part)
        return {position: reason for position, reason in enumerate(check(reasons, len(names))) if reason is not None}


def _build(
    root: str,
    folders: list[list[Any]],
    classes: list[str],
    names: list[bytes],
    labels: list[int],
    unreadable: dict[int, str],
    begin: float,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Return (header, offsets, labels, names) of the images that are readable."""
    bad = [[os.fsdecode(names[position]), reason] for position, reason in unreadable.items()]
    # Repairing a file does not change its folder's time stamp, so the stamps of unreadable files are kept too.
    stamps = [_stamp(os.path.join(os.fsencode(root), names[position])) for position in unreadable]
    kept = [position for position in range(len(names)) if position not in unreadable]
    names = [names[position] for position in kept]
    label_array = np.array([labels[position] for position in kept], np.int64)
    for label in np.flatnonzero(np.bincount(label_array, minlength=len(classes)) == 0):
        what = "no readable image" if unreadable else "no images"
        raise DataError(f"{printable(os.path.join(root, classes[label]))}: {what} in it ({' '.join(EXTENSIONS)})")
    offsets = np.cumsum([0] + [len(name) for name in names], dtype=np.int64)
    joined = np.frombuffer(b"".join(names), np.uint8)
    fingerprint = hashlib.sha256(joined.tobytes() + offsets.tobytes() + label_array.tobytes()).hexdigest()
    header = {
        "root": os.path.realpath(root),
        "scanned": begin,
        "folders": folders,
        "classes": classes,
        "bad": bad,
        "stamps": stamps,
        "fingerprint": fingerprint,
        "count": len(label_array),
        "bytes": len(joined),
    }
    return header, offsets, label_array, joined
