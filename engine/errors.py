# SPDX-License-Identifier: BSD-3-Clause
"""What a user sees as one line, the exit code that goes with it, and how a process ends."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import traceback
from typing import Callable, NoReturn

EXIT_FAILURE = 1
EXIT_USAGE = 2  # usage error or bad input
EXIT_STOPPED = 75  # stopped by a signal: everything is saved, run again with --auto-resume (EX_TEMPFAIL)


class UserError(Exception):
    """An error that is shown as one line, without a traceback. The text says what is wrong and what to do."""

    exit_code = EXIT_USAGE


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


def printable(path: str | bytes) -> str:
    """Return a path as one line of valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace("\n", "\\n")


def print_message(kind: str, text: str) -> None:
    """Print one line on stderr as the script that runs: `main.py: error: …`. kind: error or warning.

    It never fails: what a run does next must not depend on whether its message can still be printed.
    """
    with contextlib.suppress(OSError):  # a full disk, or a reader that is gone (`| tee` at Ctrl-C)
        print(f"{os.path.basename(sys.argv[0])}: {kind}: {text}", file=sys.stderr, flush=True)


_temporary_folders: list[tuple[int, str]] = []  # (the process that made it, path)


def remove_at_exit(folder: str) -> None:
    """Have exit_process remove a folder when this process ends; not a forked child of it."""
    _temporary_folders.append((os.getpid(), folder))


def exit_process(code: int) -> NoReturn:
    """End this process at once. The only call of os._exit in the program.

    A normal exit would wait for DataLoader workers and for the threads of a process group whose peers may be gone, and
    torch's own threads sometimes abort while Python shuts down.
    """
    for process, folder in _temporary_folders:
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of a pipe is gone, or the disk is full
            stream.flush()
    os._exit(code)


def escape_unprintable() -> None:
    """Print what the terminal's encoding lacks as \\x…, not as an error that ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with the code it returns; show a UserError as one line, and Ctrl-C as nothing."""
    escape_unprintable()
    try:
        code = main()
    except UserError as error:
        print_message("error", str(error))
        # Inside the handler: letting go of the traceback would shut down DataLoader workers that may hang.
        exit_process(error.exit_code)
    except KeyboardInterrupt:
        exit_process(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        exit_process(EXIT_FAILURE)
    exit_process(code)
