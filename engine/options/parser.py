# SPDX-License-Identifier: BSD-3-Clause
"""Command lines: a parser whose errors are one line, the types of flags, and checks of what will be written."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shlex
import sys
import tempfile
from typing import Any, Callable, NoReturn, Sequence

from engine.errors import EXIT_USAGE, UsageError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes `-b8` on Python 3.7 too.

    files: whether @FILE reads flags from a file.
    """

    def __init__(self, prog: str, description: str, *, files: bool = False) -> None:
        super().__init__(
            prog, description=description, allow_abbrev=False, fromfile_prefix_chars="@" if files else None
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an @file: `--flag value`, quoted as in a shell. A word with # in front starts a comment."""
        try:
            return shlex.split(re.sub(r"(^|\s)#.*", "", arg_line.lstrip("\ufeff")))  # Windows' mark of UTF-8
        except ValueError as error:
            self.error(f"{arg_line.strip()}: {error}")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+): (?=must)", r"\1 ", message)  # "--epochs must be at least 1, got 0"
        message = re.sub(r"^argument ", "", message)
        message = re.sub(r": ignored explicit argument (.*)$", r" takes no value, got \1", message)
        message = re.sub(r"^\[Errno \d+\] (.*): '(.*)'$", r"@\2: \1", message)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        for flag in difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []:
            message += f" (did you mean {flag}?)"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see python {self.prog} --help\n")
        raise AssertionError("unreachable: exit() raises SystemExit")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            action = self._option_string_actions.get(word[:2])
            if len(word) > 2 and word[0] == "-" and word[1] != "-" and action is not None and action.nargs is None:
                words += [word[:2], word[2:].lstrip("=")]
            else:
                words.append(word)
        try:
            return super().parse_args(words, namespace)
        except UnicodeDecodeError as error:
            self.error(f"an @file is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8")
        except RecursionError:
            self.error("an @file names itself")


def number(
    kind: type,
    at_least: float | None = None,
    at_most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float inside the bounds."""
    bounds = []
    if at_least is not None:
        bounds.append(f"at least {at_least}")
    if above is not None:
        bounds.append(f"above {above}")
    if at_most is not None:
        bounds.append(f"at most {at_most}")
    if below is not None:
        bounds.append(f"below {below}")
    expected = f"expected {'an integer' if kind is int else 'a number'}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
        too_low = (at_least is not None and value < at_least) or (above is not None and value <= above)
        too_high = (at_most is not None and value > at_most) or (below is not None and value >= below)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if too_low or too_high:
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}, got {text}")
        return value

    return parse


def device_list(text: str) -> list[int]:
    """An argparse type: device numbers such as `0,1,2,3`."""
    try:
        devices = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected device numbers such as 0,1,2,3, got {text!r}") from None
    if min(devices) < 0:
        raise argparse.ArgumentTypeError(f"expected device numbers from 0 up, got {text!r}")
    return devices


def nonempty_path(text: str) -> str:
    """An argparse type: a path. An empty one is most likely a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return text


def check_folder(flag: str, folder: str) -> None:
    """Make a folder if it is missing. Raises UsageError if it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror})") from error


def check_file(flag: str, file: str) -> None:
    """Make the folder of a file that will be written. Raises UsageError if it cannot be written there."""
    if os.path.isdir(file):
        raise UsageError(f"{flag} {file}: expected a file, this is a folder")
    check_folder(flag, os.path.dirname(file) or ".")


def loss_scale(text: str) -> float | str:
    """An argparse type: a positive number, or `dynamic`."""
    return text if text == "dynamic" else number(float, above=0)(text)
