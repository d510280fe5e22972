# SPDX-License-Identifier: BSD-3-Clause
"""A file of features: FILE.npy with a row per image, FILE.txt with the images' names in the same order."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import IO, Callable, Iterator, Sequence

from engine import console
from engine.errors import UsageError, printable

import numpy as np


def paths(path: str) -> tuple[str, str]:
    """Return FILE.npy and FILE.txt."""
    return path, f"{os.path.splitext(path)[0]}.txt"


@contextlib.contextmanager
def write(path: str, images: int) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    """Give a function that appends rows to both files: add(names (N), values (N, …)). images: rows at most.

    The files are written as the rows come, under other names. They get their own at the end, if no error ends the
    context and there is a row. Raises UsageError if they cannot be written.
    """
    targets = paths(path)
    parts = [f"{target}.part" for target in targets]
    shape: tuple[int, ...] = (0,)

    def add(names: Sequence[str], values: np.ndarray) -> None:
        nonlocal shape
        if not shape[0]:
            _check_space(path, images * values[0].nbytes)
        shape = (shape[0] + len(values), *values.shape[1:])
        rows.write(np.ascontiguousarray(values, "<f4").data)
        lines.writelines(f"{printable(name)}\n" for name in names)

    try:
        with open(parts[0], "wb") as rows, open(parts[1], "w", encoding="utf-8") as lines:
            _write_header(rows, shape)
            yield add
            rows.seek(0)
            _write_header(rows, shape)  # only now is the number of rows known
            for file in (rows, lines):
                file.flush()
                os.fsync(file.fileno())
        if shape[0]:
            for part, target in zip(parts, targets):
                os.replace(part, target)
            size = " × ".join(str(length) for length in shape[1:])
            console.notice(f"features written to {path}: {shape[0]:,} rows of {size}; names in {targets[1]}")
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror}") from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                os.remove(part)


def _check_space(path: str, needed: int) -> None:
    """Raise UsageError now, not after hours, if the disk lacks the space for all rows."""
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    if needed > free:
        sizes = f"all rows take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
        raise UsageError(f"--output {path}: {sizes}: choose another disk, fewer images, a deeper layer or --pool avg")


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file of float32. NumPy pads it to 128 bytes, whatever the number of rows."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
