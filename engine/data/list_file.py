# SPDX-License-Identifier: BSD-3-Clause
"""A list of images: a text file with `path,label[,split]` on each line, as PaddleClas and ImageNet's lists have it."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter
from typing import Any, Iterator, NamedTuple, Sequence

from engine.errors import DataError, printable

import numpy as np

TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")  # in any case
NUMBER = re.compile("[0-9]{1,5}")  # a label that is the number of a class; longer ones are names


class _RowError(ValueError):
    """What is wrong with a row."""


class Listing(NamedTuple):
    """The images of a folder or of a list. Names are relative to the folder, or to that of the list."""

    folders: list[list[Any]]  # what tells that the listing is out of date, each [name]
    classes: list[str]
    names: list[bytes]
    labels: np.ndarray  # (N,) int64
    parts: np.ndarray  # (N,) uint8: 0 for training, 1 for validation; empty for a folder, and without a split
    class_folders: Sequence[str] = ()  # of a folder
    left_out: Counter[str] = Counter()


def read_list(path: str) -> Listing:
    """Read a list, without the images for testing. Raises OSError, and DataError, which names the line.

    The classes are those of the training images: names in the order of their characters, or numbers from 0 up. A row
    is refused if its path or its label cannot be used, or if its image is missing, outside the folder, or there twice.
    """
    root = os.path.dirname(path) or "."
    lines: dict[str, int] = {}  # {name: its line}
    files: dict[str, set[str]] = {}  # {folder: what is in it}
    labels: list[str] = []
    parts: list[int] = []
    line, has_split = 1, False
    try:
        for line, name, label, split in _rows(path):
            part, has_split = 0 if split is None else _part_of(split), split is not None
            if part == 2:
                continue
            name = _find(name, root, files)
            if name in lines:
                raise _RowError(f"{name} is in line {lines[name]} already: remove one of the two")
            lines[name] = line
            labels.append(unicodedata.normalize("NFC", label))
            parts.append(part)
        known = {label for label, part in zip(labels, parts) if part == 0} or set(labels)
        for label, line in zip(labels, lines.values()):  # noqa: B007  the error has the line
            if label not in known:
                raise _RowError(f"unknown label {label!r}: no training image has it")
    except _RowError as error:
        raise DataError(f"{printable(path)}, line {line}: {printable(str(error))}") from error
    if all(NUMBER.fullmatch(label) for label in known):
        numbers = {label: int(label) for label in known}
        classes = [str(number) for number in range(max(numbers.values(), default=-1) + 1)]
    else:
        classes = sorted(known)
        numbers = {label: number for number, label in enumerate(classes)}
    names = [os.fsencode(name) for name in lines]
    numbered = np.array([numbers[label] for label in labels], np.int64)
    folders = [[name] for name in (os.path.basename(path), *files)]
    return Listing(folders, classes, names, numbered, np.array(parts if has_split else [], np.uint8))


def _rows(path: str) -> Iterator[tuple[int, str, str, str | None]]:
    """Yield (line, path, label, split) of each row; split is None without a column for it. Raises DataError.

    Columns are separated by a tab, a comma or spaces, whichever the first line has that is not blank. A header may name
    them.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = next(filter(str.strip, file), "")
        if "\0" in first or first.startswith("\udcff\udcfe"):  # its mark, in front of an empty line
            raise DataError(f"{printable(path)}: this is UTF-16, not UTF-8: save it as UTF-8")
        delimiter = next((character for character in "\t," if character in first), " ")
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        columns: list[int] = []
        count = 0
        try:
            for row in reader:
                cells = [cell.strip() for cell in row if cell or delimiter != " "]
                header = [cell.lower() for cell in cells]
                if not any(cells):
                    continue
                if not columns:
                    count, columns = len(cells), list(range(len(cells)))
                    if "path" in header and "label" in header:
                        columns = [header.index(name) for name in ("path", "label", "split") if name in header]
                        continue
                if len(cells) != count or not 2 <= len(columns) <= 3 or not cells[columns[1]]:
                    raise csv.Error(
                        f"expected path, label and maybe split, got {cells}: quote a path that has spaces or commas"
                    )
                name, label, *split = (cells[column] for column in columns)
                yield reader.line_num, name, label, split[0] if split else None
        except csv.Error as error:
            raise DataError(f"{printable(path)}, line {reader.line_num}: {printable(str(error))}") from error


def _part_of(split: str) -> int:
    """Return 0 for training, 1 for validation, 2 for testing."""
    for part, names in enumerate((TRAIN, VAL, TEST)):
        if split.lower() in names:
            return part
    raise _RowError(f"expected train, val or test, got {split!r}")


def _find(name: str, root: str, files: dict[str, set[str]]) -> str:
    """Return the path of an image relative to the folder `root`, in one form. files: of the folders seen so far."""
    relative = os.path.normpath(os.path.relpath(name, root) if os.path.isabs(name) else name)
    if relative.split(os.sep)[0] == os.pardir:
        raise _RowError(f"{name} is outside the folder of the list, {root}")
    folder, base = os.path.split(relative)
    path = os.path.join(root, relative)
    if folder not in files:
        there = os.path.dirname(path)
        files[folder] = set(os.listdir(there)) if os.path.isdir(there) else set()
    # The same name in other characters, as on macOS, is not in the listing.
    if base not in files[folder] and not os.path.isfile(path):
        raise _RowError(f"no such file: {path}")
    return relative
