# SPDX-License-Identifier: BSD-3-Clause
"""--class-weights: what is given, and what it means for the classes of the data."""

from __future__ import annotations

import argparse
import csv
import unicodedata
from typing import Any, Sequence

from engine.errors import UsageError
from engine.parser import nonempty_path, number

import numpy as np


def class_weights(text: str) -> str | list[list[Any]]:
    """An argparse type: `auto`, or the lines of a file as [class, weight], the class "" if there is only a weight."""
    if text == "auto":
        return text
    try:
        with open(nonempty_path(text), encoding="utf-8-sig") as file:
            lines = [_split(line) for line in file.read().splitlines()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise argparse.ArgumentTypeError(
            f"expected auto or a file of text, got {text} ({getattr(error, 'strerror', 'not UTF-8')})"
        ) from error
    rows: list[list[Any]] = []
    for position, (name, weight) in enumerate(lines, 1):
        if (name or weight).strip() and (position, weight.strip().lower()) != (1, "weight"):  # no empty line, no header
            try:
                rows.append([name.strip(), number(float, 0)(weight)])
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{text}, line {position}: {error}") from None
    return rows


def _split(line: str) -> tuple[str, str]:
    """Return class and weight of a line. A class may have commas, in quotes or not."""
    *name, weight = next(csv.reader([line], delimiter="\t" if "\t" in line else ",")) or [""]
    return ",".join(name), weight


def resolve_class_weights(
    given: str | list[list[Any]] | None, classes: Sequence[str], labels: np.ndarray
) -> list[float] | None:
    """Return the weight of each class in the training loss. Their mean over the training images is 1, as without any.

    given: what --class-weights has: `auto` weights by the inverse of the number of images, images / (classes · images
    of the class), after King & Zeng, "Logistic Regression in Rare Events Data", 2001. Raises UsageError.
    """
    if given is None:
        return None
    counts = np.bincount(labels, minlength=len(classes))
    if isinstance(given, str):
        weights = (counts > 0) / np.maximum(counts, 1)  # label smoothing would push towards a class without images
    else:
        named = {unicodedata.normalize("NFC", name): weight for name, weight in given}
        names = named.keys() - {""}
        wrong = sorted(names ^ set(classes)) if names else []
        if wrong:
            where = "the file" if wrong[0] in classes else "the data"
            raise UsageError(f"--class-weights: {where} has no class {wrong[0]!r}")
        if len(given) != len(classes):
            raise UsageError(f"--class-weights: expected {len(classes)} weights, one per class, got {len(given)}")
        weights = np.array([named[name] for name in classes] if names else [weight for _, weight in given])
    largest = weights[counts > 0].max()
    if not largest:
        raise UsageError("--class-weights: the weights of all training images are 0")
    weights = np.ldexp(weights, -np.frexp(largest)[1])  # by a power of two, which is exact: the sum cannot overflow
    return (weights * (len(labels) / (weights * counts).sum())).tolist()
