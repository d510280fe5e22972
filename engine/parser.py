# SPDX-License-Identifier: BSD-3-Clause
"""Command lines: a parser whose errors are one line, the types of flags, and checks of what will be written."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
import tempfile
from math import inf, isfinite
from typing import Any, Callable, NoReturn, Sequence

from engine.errors import EXIT_USAGE, UsageError

REWORDED = [  # from argparse's words to ours
    (r"^argument ([^:]+): (?=must)", r"\1 "),  # "--epochs must be at least 1, got 0"
    (r"^argument ", ""),
    (r": ignored explicit argument (.*)$", r" takes no value, got \1"),
    (r"^\[Errno \d+\] ([^:]*): (['\"])(.*)\2$", r"@\3: \1"),
]
# A comment begins with a word, outside of quotes; for shlex it may begin within a word, as in run#3.
QUOTED_OR_COMMENT = r"""(\\.#*|'[^']*'|"(?:\\.|[^"\\])*")|(?<!\S)#.*"""
# What programs call a trained model.
MODEL_FLAGS = ["--checkpoint", "--resume", "--pretrained", "--weights", "--model", "--ckpt"]


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
            line = arg_line.lstrip("\ufeff")  # Windows' mark of UTF-8
            return shlex.split(re.sub(QUOTED_OR_COMMENT, lambda match: match[1] or "", line))
        except ValueError as error:
            self.error(f"{arg_line.strip()}: {error}")

    def error(self, message: str) -> NoReturn:
        for pattern, ours in REWORDED:
            message = re.sub(pattern, ours, message)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}{self._hint(message)}; see python {self.prog} --help\n")
        raise AssertionError("unreachable: exit() raises SystemExit")

    def _hint(self, message: str) -> str:
        """Return a guess what was meant by an unknown flag, or by a device such as cuda:0."""
        flags = self._option_string_actions
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        device = re.search(r"--device: invalid choice: '(npu|gpu|cuda|mps|cpu):(\d+)'", message)
        guesses: list[str] = []
        if unknown:
            known = MODEL_FLAGS if unknown[1] in MODEL_FLAGS else difflib.get_close_matches(unknown[1], flags, n=1)
            if unknown[1] == "--model":  # timm's and torchvision's name of the architecture
                known = ["--arch", *known]
            guesses = [flag for flag in known if flag in flags]
        elif device:
            guesses = [f"--device {device[1].replace('cuda', 'gpu')} --gpu {device[2]}"]
        return f" (did you mean {guesses[0]}?)" if guesses else ""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            action = self._option_string_actions.get(word[:2])
            if re.match("-[^-].", word) and action is not None and action.nargs is None:
                words += [word[:2], word[2:].lstrip("=")]
            elif word[:2] == "@~" and self.fromfile_prefix_chars:
                words.append("@" + os.path.expanduser(word[1:]))
            else:
                words.append(word)
        for word in words[: words.index("--")] if "--" in words else words:
            if re.match("--[a-z]", word) and word.partition("=")[0] not in self._option_string_actions:
                self.error(f"unrecognized arguments: {word}")  # argparse would first name the flags that are missing
        try:
            return super().parse_args(words, namespace)
        except UnicodeDecodeError as error:
            self.error(f"an @file is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8")
        except RecursionError:
            self.error("an @file names itself")


def number(
    kind: type, at_least: float = -inf, at_most: float = inf, *, above: float = -inf, below: float = inf
) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float inside the bounds."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    expected = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if isfinite(bound))

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
        if kind is float and not isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        if not (at_least <= value <= at_most and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    return parse


def device_list(text: str) -> list[int]:
    """An argparse type: device numbers such as `0,1,2,3`."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise argparse.ArgumentTypeError(f"expected device numbers from 0 up, such as 0,1,2,3, got {text!r}")
    return [int(word) for word in text.split(",")]


def nonempty_path(text: str) -> str:
    """An argparse type: a path. An empty one is most likely a shell variable that is not set; a ~ was in quotes."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return os.path.expanduser(text)


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
