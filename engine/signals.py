# SPDX-License-Identifier: BSD-3-Clause
"""Signals: requests to stop, DataLoader workers that outlast them, and processes that die with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Iterator

from engine import console
from engine.errors import EXIT_FAILURE, EXIT_STOPPED

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT] + ([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])
SECOND_SIGNAL_SECONDS = 2  # Ctrl-C reaches a process from the terminal and again from the launcher: that is one request


class StopSignals:
    """A flag that SIGTERM, SIGINT and SIGUSR1 set. A second signal, more than two seconds later, exits at once.

    Before `training` is set there is nothing to save, and the first signal exits at once with code 75.
    """

    EXIT_CODE = EXIT_STOPPED

    def __init__(self) -> None:
        self.training = False
        self.first: float | None = None  # time.monotonic() of the first signal
        # Python runs signal handlers between two bytecodes, so not while a collective or a backward pass hangs. The
        # signal's number is written to this socket at once, though, and a thread reads it.
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(receiver,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher has blocked them

    def _listen(self, receiver: socket.socket) -> None:
        while True:
            number = receiver.recv(1)[0]
            if number not in STOP_SIGNALS:
                continue
            if not self.training:
                console.warning_once_per_node("stopped by a signal; there was nothing to save")
                console.exit_process(EXIT_STOPPED)
            if self.first is None:
                self.first = time.monotonic()
            elif time.monotonic() - self.first > SECOND_SIGNAL_SECONDS:
                console.exit_process(128 + number)

    def __bool__(self) -> bool:
        return self.first is not None


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, however that happens (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            console.exit_process(EXIT_FAILURE)


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """A context whose child processes start with SIGTERM blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(parent: int) -> None:
    """Make this DataLoader worker end with its parent, and on its parent's SIGTERM, but on no other stop signal.

    A signal may reach every process of a terminal or job, while the parent still needs batches to finish its step and
    save. At its end the parent sends SIGTERM (multiprocessing's `terminate`). The sender tells the two apart, as in
    torch's own handler for workers (torch/csrc/DataLoader.cpp, handler_SIGTERM).
    """
    signal.set_wakeup_fd(-1)  # inherited: it would tell the parent of this process's signals
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_sigterm_of, args=(parent,), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    console.exit_process(0)
