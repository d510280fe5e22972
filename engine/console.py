# SPDX-License-Identifier: BSD-3-Clause
"""All that the program prints, and how a process ends. No other module prints.

What a run does next never depends on whether its messages can still be printed: the disk may be full, the reader of a
pipe may be gone (`| tee` at Ctrl-C), a stream may be closed.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import os
import shutil
import signal
import sys
import traceback
from typing import Any, Callable, Iterator, NoReturn, TextIO

from engine.errors import EXIT_FAILURE, UserError

_prints = os.environ.get("LOCAL_RANK", "0") == "0"  # torchrun's variable; the launcher calls be_quiet instead
_lost = False  # whether a line was lost already
_bar: Any = None  # tqdm's


def be_quiet() -> None:
    """Print no lines in this process: it is not the local main process."""
    global _prints
    _prints = False


def is_quiet() -> bool:
    return not _prints


def line(text: str) -> None:
    """Print a line on the local main process, above the progress bar if there is one."""
    if _prints:
        with warn_once():
            result(text)


def result(text: str) -> None:
    """Print output that the user asked for. Raises OSError if it is lost."""
    if _bar is not None:
        _bar.clear()
    _print(text, sys.stdout)
    if _bar is not None:
        _bar.refresh()


def _print(text: str, stream: TextIO | None) -> None:
    """Print a line in one write: print() makes two if PYTHONUNBUFFERED is set, and the lines of two ranks would mix."""
    if stream is not None:  # closed when the process started
        stream.write(f"{text}\n")
        stream.flush()


def warning(text: str) -> None:
    _message("warning", text)


def warning_once_per_node(text: str) -> None:
    """Print a warning that every process of a node would print."""
    if _prints:
        warning(text)


def error(text: str) -> None:
    _message("error", text)


def notice(text: str) -> None:
    """Print a line on stderr, because stdout is for results."""
    with contextlib.suppress(OSError):
        _print(f"=> {text}", sys.stderr)


def _message(kind: str, text: str) -> None:
    """Print `main.py: error: …` on stderr."""
    with contextlib.suppress(OSError):
        _print(f"{os.path.basename(sys.argv[0])}: {kind}: {text}", sys.stderr)


def unexpected(text: str) -> None:
    """Print a traceback."""
    with contextlib.suppress(OSError):
        _print(text.rstrip("\n"), sys.stderr)


@contextlib.contextmanager
def warn_once() -> Iterator[None]:
    """A context in which the first line or record that cannot be written costs a warning, and the rest nothing."""
    global _lost
    try:
        yield
    except OSError as error:
        if not _lost:
            _lost = True
            warning(f"log output is being lost ({error})")


@contextlib.contextmanager
def progress(total: int, done: int, label: str, unit: str = " images") -> Iterator[None]:
    """Show a bar with ETA and speed on a terminal if tqdm is installed. total, done: images of all processes."""
    global _bar
    if _prints and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            look = {"unit": unit, "unit_scale": unit == "B", "leave": False, "dynamic_ncols": True}
            _bar = tqdm(total=total, initial=done, desc=label, **look)
    try:
        yield
    finally:
        if _bar is not None:
            _bar.close()
            _bar = None


def advance(images: int) -> None:
    """Move the progress bar."""
    if _bar is not None:
        _bar.update(min(images, _bar.total - _bar.n))  # the last validation batch is a smaller one


# --- the end of a process ---------------------------------------------------------------------------------------------

_temporary_folders: list[tuple[int, str]] = []  # (the process that made it, path)


def remove_at_exit(folder: str) -> None:
    """Have a folder removed when this process ends, by exit_process or not; not when a forked child of it does."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
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
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handle a character that an encoding lacks: a byte of a path stays that byte, any other becomes \\x…."""
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":
        return bytes([ord(error.object[error.start]) - 0xDC00]), error.start + 1
    return codecs.backslashreplace_errors(error)


def escape_unprintable() -> None:
    """Print what the terminal's encoding lacks as \\x…, not as an error that ends the run; nothing on a closed stream.

    The next file to be opened would be the closed stream, and C libraries would print into it.
    """
    codecs.register_error("escape", _escape)
    for name in ("stdin", "stdout", "stderr"):  # closed when the program started
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escape")  # type: ignore[attr-defined]


def run_script(main: Callable[[], int], *, main_flags: bool = True) -> NoReturn:
    """Run a script's `main` and exit with the code it returns; show a UserError as one line, and Ctrl-C as nothing.

    main_flags: whether the script has the flags of main.py, which a UserError may advise.
    """
    escape_unprintable()
    # A background job of a script, or one under nohup, inherits SIGINT ignored. It must stop on SIGINT like any other.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except UserError as failure:
        error(str(failure) if main_flags else failure.args[0])
        # Inside the handler: letting go of the traceback would shut down DataLoader workers that may hang.
        exit_process(failure.exit_code)
    except KeyboardInterrupt:
        exit_process(128 + signal.SIGINT)
    except Exception:
        unexpected(traceback.format_exc())
        exit_process(EXIT_FAILURE)
    exit_process(code)
