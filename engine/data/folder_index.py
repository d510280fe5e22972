# SPDX-License-Identifier: BSD-3-Clause
"""The files of an image folder, or of a list of images, listed once and cached in four arrays.

A list of ImageNet's 1.28 million paths would take 150 MB in every process, and DataLoader workers would copy it page by
page as reference counts change. The arrays are memory-mapped from a file in the user's cache folder, so a later start
does not list the files again.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Counter, Dict, Iterator, List

from engine import console
from engine.data.decoding import UnreadableError, read_file, read_rgb, reason_of
from engine.data.list_file import Listing, read_list
from engine.errors import DataError, counted, printable

import numpy as np

FORMAT = 4  # part of the cache file's name: raise it if other files are listed, or if the layout changes
# Those of torchvision's ImageFolder, and the other names of JPEGs.
EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXTENSIONS += (".jfif", ".jpe")
if importlib.util.find_spec("PIL._avif"):
    EXTENSIONS += (".avif",)
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)
# What storage boxes, macOS, Windows and Linux put beside images, in lower case: thumbnails, removed files.
_SYSTEM_NAMES = {b"@eadir", b"#recycle", b"@recycle", b"__macosx", b"lost+found", b"$recycle.bin"}
_SYSTEM_NAMES.add(b"system volume information")
SETTLING_SECONDS = 2  # a folder changed this shortly before it was listed may change again with the same time stamp
CHUNK = 64  # images that a thread checks at a time
KINDS = 5  # of what is left out, that are named

Folders = List[List[Any]]  # [name below the root, *its stamp]


# labels: (N,) int64. parts: (N,) uint8, see Listing. names: the paths below the root, one after the other: uint8. ends:
# (N + 1,) int64, where they end. header: JSON, with the rest and with what tells whether the index is out of date.
Parts = Dict[str, Any]


class FolderIndex:
    """The images of a folder or a list. parts: see Listing. unreadable: (path, reason) of the images left out."""

    def __init__(self, root: str, parts: Parts) -> None:
        header = json.loads(bytes(parts["header"]).decode())
        arrays = (np.asarray(parts[name]) for name in ("labels", "parts", "ends", "names"))
        self.labels, self.parts, self._ends, self._names = arrays
        self.listed, self.root, self.header = root, os.fsencode(_root_of(root)), header
        self.classes: list[str] = header["classes"]
        self.fingerprint: str = header["fingerprint"]
        self.unreadable = [(printable(os.path.join(root, name)), reason) for name, reason in header["bad"]]
        self.left_out = collections.Counter(header["left_out"])
        self.folders = [folder[0] for folder in header["folders"]]  # names below the root; the first is the root
        self.is_new = False  # whether the files were listed now

    def name(self, index: int) -> bytes:
        """Return the path of an image relative to the folder."""
        return self._names[self._ends[index] : self._ends[index + 1]].tobytes()

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.name(index)))

    def is_current(self) -> bool:
        """Whether the folder is still as it was listed. Raises KeyError if this is no index.

        Unpacking an archive sets modification times, but nobody can set a change time. An object store has no times of
        folders: it shows 0, or one time for all.
        """
        folders = self.header["folders"]
        times = [time for _, modified, changed, *_ in folders for time in (modified, changed)]
        return (
            self.header["root"] == os.path.realpath(self.listed)
            and min(changed for _, _, changed, *_ in folders) > 0
            and min(times) < max(times) <= (self.header["scanned"] - SETTLING_SECONDS) * 1e9
            and all(_stamp(self.root, name) == old for name, *old in folders)
            and all(_stamp(self.root, name) == old for (name, _), old in zip(self.header["bad"], self.header["stamps"]))
        )


def _root_of(listed: str) -> str:
    """Return the folder that names are relative to: that of a list file."""
    return (os.path.dirname(listed) or ".") if os.path.isfile(listed) else listed


def open_index(root: str, skip_unreadable: bool = False) -> FolderIndex:
    """Return the index of a folder or a list file: the cached one unless a folder has changed, else a new one.

    skip_unreadable: leaves unreadable images out. Raises DataError if there is no folder or no class, or an empty one.
    """
    try:
        path = _cache_path(root, checked=skip_unreadable)
        index = _open_cached(path, root) or _list_again(path, root, skip_unreadable)
    except OSError as error:
        raise DataError(f"{printable(error.filename or root)}: {error.strerror}") from error
    if not index.is_new:
        count = f"{counted(len(index.labels), 'image')} in {printable(root)}"
        console.line(f"=> {count}, by the list of an earlier start; to list them again, delete {path}")
    if index.left_out:
        console.line(f"=> {printable(root)}: {describe_left_out(index.left_out)}")
    return index


def _open_cached(path: str | None, root: str) -> FolderIndex | None:
    """Return the cached index if there is one that is current."""
    if path is not None:
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # not there, or damaged
            index = _load(path, root)
            if index.is_current():
                return index
    return None


def _list_again(path: str | None, root: str, skip_unreadable: bool) -> FolderIndex:
    """Return a new index, and keep it in a file if there is a place for one."""
    begin = time.time()
    listing = _list_file(root) if os.path.isfile(root) else _list_folder(root)
    unreadable = _find_unreadable(_root_of(root), listing.names) if skip_unreadable else {}
    parts = _build(root, begin, listing, unreadable)
    del listing
    index = None
    if path is not None:
        # If there is no place, the next start lists the files again. NumPy's records end at 2 GiB.
        with contextlib.suppress(OSError, ValueError):
            _save(path, parts)
            index = _load(path, root)
    index = index or FolderIndex(root, parts)
    index.is_new = True
    return index


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_path(root: str, checked: bool) -> str | None:
    """The cache file of a folder: in the user's cache folder, never among the data. None if the user has no home.

    Nodes that share a home folder may give a shared disk different numbers: each has a list of its own then.
    """
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
    if cache.startswith("~"):
        return None
    what = f"{os.stat(root).st_dev} {EXTENSIONS} {os.path.realpath(root)}"
    name = hashlib.sha256(os.fsencode(what)).hexdigest()[:24]
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
    """Return what changes with a file or folder, or nothing if it is not there."""
    try:
        return _stamp_of(os.stat(os.path.join(root, os.fsencode(name))))
    except OSError:
        return []


def _stamp_of(status: os.stat_result) -> list[int]:
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev, status.st_size]


# --- a new index ------------------------------------------------------------------------------------------------------


def _list_file(path: str) -> Listing:
    listing, root = read_list(path), os.fsencode(_root_of(path))
    return listing._replace(folders=[[name, *_stamp(root, name)] for (name,) in listing.folders])


def _list_folder(root: str) -> Listing:
    """List the images of a folder.

    Classes are normalized (NFC) and in that order, because macOS spells the same names in other characters.
    """
    folders: Folders = [["", *_stamp(os.fsencode(root), "")]]
    classes: dict[str, str] = {}
    left_out: Counter[str] = collections.Counter()
    names = {entry.name: entry.is_dir() for entry in os.scandir(root)}
    for normal, name in sorted((unicodedata.normalize("NFC", name), name) for name in names):
        kind = kind_left_out(os.fsencode(name), names[name]) or (None if names[name] else "not in a class")
        if kind is not None:
            left_out[kind] += 1
        elif normal in classes:
            two = f"{ascii(classes[normal])} and {ascii(name)}"
            raise DataError(f"{printable(root)}: two folders have the same name, {two}: move their images into one")
        else:
            classes[normal] = name
    if not classes:
        found = f"; {describe_left_out(left_out)}" if left_out else ""
        raise DataError(f"{printable(root)}: no classes in it (expected one folder per class{found})")
    images = [_list_class(os.fsencode(root), name, folders, left_out) for name in classes.values()]
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in images])
    flat = [name for group in images for name in group]
    return Listing(folders, list(classes), flat, labels, np.zeros(0, np.uint8), list(classes.values()), left_out)


def _list_class(root: bytes, name: str, folders: Folders, left_out: Counter[str]) -> list[bytes]:
    """Return the images below root/name relative to root, in the order of torchvision's ImageFolder.

    Adds each folder to `folders`. Raises OSError, and DataError if there are none.
    """
    found, before = [], left_out.copy()
    for folder, status, images in walk(root, os.fsencode(name), left_out):
        folders.append([os.fsdecode(folder), *_stamp_of(status)])
        found.append((os.fsdecode(folder), sorted(images, key=os.fsdecode)))
    if not any(images for _, images in found):
        path, own = printable(os.path.join(os.fsdecode(root), name)), left_out - before
        others = f"; {describe_left_out(own)}" if own else ""
        raise DataError(f"{path}: no images in it ({' '.join(EXTENSIONS)}{others})")
    return [image for _, images in sorted(found) for image in images]


def _raise(error: OSError) -> None:
    raise error


def walk(
    root: bytes, start: bytes, left_out: Counter[str], fail: Callable[[OSError], None] = _raise
) -> Iterator[tuple[bytes, os.stat_result, list[bytes]]]:
    """Yield (folder, its status before, its images) for root/start and the folders in it; names are relative to root.

    Follows links, but enters each folder once, so that a loop of links ends. Counts what is left out, by kind. fail:
    called with the error of a folder that cannot be read.
    """
    pending, seen = [start], set()
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            fail(error)
            continue
        images = []
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself
                fail(error)
                continue
            kind = kind_left_out(entry.name, is_folder)
            if kind is not None:
                left_out[kind] += 1
            elif is_folder:
                pending.append(os.path.join(folder, entry.name))
            else:
                images.append(os.path.join(folder, entry.name))
        yield folder, status, images


def kind_left_out(name: bytes, is_folder: bool) -> str | None:
    """Return the kind of a file or folder that is not read, or None for an image and for a folder of images."""
    lower = name.lower()
    if lower.startswith(b"."):
        return "hidden"
    if lower.endswith(_ENDINGS) and not is_folder:
        return None
    if lower in _SYSTEM_NAMES:
        return os.fsdecode(name)
    return None if is_folder else os.path.splitext(os.fsdecode(lower))[1] or "without an ending"


def describe_left_out(left_out: Counter[str]) -> str:
    """Return how many files and folders are left out, and of which kinds."""
    named = left_out.most_common(KINDS)
    total, others = sum(left_out.values()), sum(left_out.values()) - sum(count for _, count in named)
    kinds = [f"{count:,} {printable(kind)}" for kind, count in named] + [counted(others, "other")] * (others > 0)
    return f"{counted(total, 'file')} and folders left out: {', '.join(kinds)}"


def _find_unreadable(root: str, names: list[bytes]) -> dict[bytes, str]:
    """Read each image once, in one thread per core. Returns {name: reason} of those that cannot be read."""

    def check(first: int) -> dict[bytes, str]:
        bad = {}
        for name in names[first : first + CHUNK]:
            try:
                read_rgb(read_file(os.path.join(os.fsencode(root), name)))
            except (OSError, UnreadableError) as error:
                bad[name] = reason_of(error)
        return bad

    console.line(f"=> checking {counted(len(names), 'image')}, once")
    unreadable: dict[bytes, str] = {}
    with console.progress(len(names), 0, "Checking"), ThreadPoolExecutor(os.cpu_count()) as threads:
        for bad in threads.map(check, range(0, len(names), CHUNK)):  # Pillow decodes without Python's lock
            unreadable.update(bad)
            console.advance(CHUNK)
    return unreadable


def _build(listed: str, begin: float, listing: Listing, unreadable: dict[bytes, str]) -> Parts:
    """Return the index of the images that are readable."""
    root = _root_of(listed)
    names = [name for name in listing.names if name not in unreadable]
    kept = np.array([name not in unreadable for name in listing.names], bool)
    labels, parts = listing.labels[kept], listing.parts[kept[: len(listing.parts)]]
    for images, folder in zip(np.bincount(labels, minlength=len(listing.classes)), listing.class_folders):
        if not images:
            raise DataError(f"{printable(os.path.join(root, folder))}: no readable image in it")
    ends = np.cumsum([0] + [len(name) for name in names], dtype=np.int64)
    text = b"".join(names)
    bad = [[os.fsdecode(name), reason] for name, reason in unreadable.items()]
    header = {
        "root": os.path.realpath(listed),
        "scanned": begin,
        "folders": listing.folders,
        "classes": listing.classes,
        "left_out": listing.left_out,
        "bad": bad,
        # Repairing a file does not change its folder's time stamp, so the stamps of unreadable files are kept too.
        "stamps": [_stamp(os.fsencode(root), name) for name, _ in bad],
        "fingerprint": hashlib.sha256(text + ends.tobytes() + labels.tobytes() + parts.tobytes()).hexdigest(),
    }
    columns = [np.frombuffer(content, np.uint8) for content in (text, json.dumps(header).encode())]
    return {"ends": ends, "labels": labels, "parts": parts, "names": columns[0], "header": columns[1]}
