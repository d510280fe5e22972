# SPDX-License-Identifier: BSD-3-Clause
"""Where the classes are: in train/ and val/, in the folder itself, or one level too high or too low."""

from __future__ import annotations

import contextlib
import os
from typing import Sequence

from engine.data.folder_index import FolderIndex, open_index
from engine.data.list_file import TEST, TRAIN, VAL
from engine.errors import DataError, printable


def _folders(path: str) -> list[str]:
    """Return the names of the folders in a folder, in order. Raises DataError if it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError as error:
        raise DataError(f"{printable(error.filename or path)}: {error.strerror}") from error


def find_part(root: str, names: Sequence[str]) -> str | None:
    """Return the path of the folder in `root` that has one of the names, in any case; of several, the first name's."""
    found = [
        (names.index(name.lower()), name != name.lower(), name) for name in _folders(root) if name.lower() in names
    ]
    return os.path.join(root, min(found)[-1]) if found else None


def _is_split(names: Sequence[str], *, alone: bool) -> bool:
    """Whether folders of these names are the parts of a dataset. alone: nothing lies beside the folder they are in."""
    lower = {name.lower() for name in names}
    return bool(lower & {*TRAIN}) and (alone or bool(lower & {*VAL, *TEST}))


def advice_of(root: str) -> tuple[str, str]:
    """Return what to do about a folder without train/ and val/, as the end of a sentence: in general, in main.py."""
    names = _folders(root)
    parent, own = os.path.split(os.path.abspath(root))
    with contextlib.suppress(DataError):
        if own.lower() in TRAIN + VAL + TEST and find_part(parent, TRAIN) and find_part(parent, VAL):
            return f", but beside it: use {printable(parent)}", ""
    for name in names:
        with contextlib.suppress(DataError):
            if _is_split(_folders(os.path.join(root, name)), alone=len(names) == 1):
                return f", but in {printable(name)}/: use {printable(os.path.join(root, name))}", ""
    if len(names) == 1 or any(name.lower() in TEST for name in names):
        return f", only {', '.join(printable(name) + '/' for name in names[:5])}: use the folder that has them", ""
    return "", "; if its folders are the classes, use --val-split 0.1"


def open_classes(root: str, skip_unreadable: bool) -> FolderIndex:
    """Return the index of a folder. Raises DataError if there is a single class, or if the classes lie deeper."""
    index = open_index(root, skip_unreadable)
    inside: dict[str, list[str]] = {}  # the folders in each class
    for folder in index.folders:
        name, _, sub = folder.partition(os.sep)
        if sub and os.sep not in sub:
            inside.setdefault(name, []).append(sub)
    single = len(index.classes) == 1
    for name, names in inside.items():
        if _is_split(names, alone=single):
            path = printable(os.path.join(root, name))
            raise DataError(f"{path} is no class: {', '.join(sorted(names)[:5])} in it; use {path}")
    if single:
        name = index.classes[0]
        found = f"a single class, {printable(name)}"
        if inside:
            folder, names = inside.popitem()  # as on the disk: a macOS name differs from that of the class
            found += f", with the folders {', '.join(sorted(names)[:5])}; if these are the classes, they must lie "
            found += f"directly in {printable(root)}, or use {printable(os.path.join(root, folder))}"
        raise DataError(f"{printable(root)}: expected at least two folders, one per class; found {found}")
    return index
