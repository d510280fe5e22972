# SPDX-License-Identifier: BSD-3-Clause
"""What a user sees as one line, and the exit code that goes with it."""

from __future__ import annotations

import os
import re

EXIT_FAILURE = 1
EXIT_USAGE = 2  # usage error or bad input
EXIT_STOPPED = 75  # stopped by a signal: everything is saved, run again with --auto-resume (EX_TEMPFAIL)


class UserError(Exception):
    """An error that is shown as one line, without a traceback. The text says what is wrong and what to do.

    A second text, the end of the first, names flags of main.py: other scripts do not show it.
    """

    exit_code = EXIT_USAGE

    def __str__(self) -> str:
        return "".join(self.args)


class UsageError(UserError):
    """Flags, files or data that do not fit together."""


class DeviceUnavailableError(UserError):
    """The machine or the installed torch lacks what the flags ask for."""


class DataError(UserError):
    """A dataset that cannot be used. The text names the folder or file."""


class ImageError(DataError):
    """An image that cannot be read. The text names the file."""


class CheckpointError(UserError):
    """A file that is corrupt, is not a checkpoint, or carries code. The text names it."""


class CheckpointReadError(CheckpointError):
    """A file that the system cannot read now. Its content may be intact."""


class RendezvousError(UserError):
    """The processes of a job cannot find each other."""


class DivergedError(UserError):
    """Training cannot continue: its numbers are not finite, or the processes disagree."""

    exit_code = EXIT_FAILURE


class SaveError(UserError):
    """The last checkpoint of a run could not be written."""

    exit_code = EXIT_FAILURE


class LoaderWorkerError(UserError):
    """A DataLoader worker has died, or has no shared memory left."""

    exit_code = EXIT_FAILURE


def first_line(error: Exception) -> str:
    """Return what an error says, on one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def counted(count: int, noun: str) -> str:
    """Return `1 image`, `5,004 images`, `2 classes`, `3 batches`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith(('s', 'ch')) else 's'}"


def printable(path: str | bytes) -> str:
    """Return a path as one line of valid text."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    # Control characters, and what else str.splitlines takes for the end of a line.
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda match: match[0].encode("unicode_escape").decode(), text)
