# SPDX-License-Identifier: BSD-3-Clause
"""What a user sees as one line."""

from __future__ import annotations

import pickle

from engine import errors
from engine.errors import counted, first_line, printable

import pytest


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("x"), "'x'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_an_error_is_one_line_and_never_empty(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize("texts", [["a"], ["a", "; use --workers 0"]])
def test_only_main_shows_what_names_its_flags(texts):
    error = pickle.loads(pickle.dumps(errors.DataError(*texts)))  # as a DataLoader worker sends it
    assert str(error) == first_line(error) == "".join(texts) and error.args[0] == "a"


@pytest.mark.parametrize(
    "path, text",
    [("a b/图.jpg", "a b/图.jpg"), ("a\nb", "a\\nb"), (b"caf\xe9", "caf\\xe9"), ("caf\udce9", "caf\\xe9"), ("", "")],
)
def test_any_path_is_one_line_of_valid_text(path, text):
    assert printable(path) == text
    printable(path).encode()


def test_each_user_error_has_the_exit_code_of_its_kind():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    failures = {kind.__name__ for kind in kinds if kind.exit_code == 1}
    assert failures == {"DivergedError", "SaveError", "LoaderWorkerError"}
    assert {kind.exit_code for kind in kinds} == {1, 2} and errors.EXIT_STOPPED == 75


@pytest.mark.parametrize(
    "count, noun, text",
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (5004, "step", "5,004 steps"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (1, "batch", "1 batch"),
        (3, "batch", "3 batches"),
        (8, "process", "8 processes"),
    ],
)
def test_a_number_agrees_with_its_noun(count, noun, text):
    assert counted(count, noun) == text
