# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files: written so that an intact one exists at every moment, read without running anything in them.

Writing: the state is copied to memory; then, in the background, it is written under a temporary name, flushed to the
disk and renamed. The file before it is kept as `*.previous`. The file is what torch.save writes, with its SHA-256
checksum in the comment field that ends a zip archive: torch.load reads it as usual, `load` also verifies it.

Reading: torch.load is not used. Before torch 2.10 it can run code even with weights_only (CVE-2025-32434,
CVE-2026-24747), and before 1.13 it has no weights_only. `load` reads torch's zip format and the older format of torch
before 1.6.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import shutil
import struct
import threading
import time
import zipfile
from typing import IO, Any, Callable

from engine.errors import CheckpointError, UsageError
from engine.safe_pickle import CarriesCodeError, Storages, load_tensors

import numpy as np
import torch

CHECKSUM_MARK = b"sha256:"
LOCK_SECONDS, FINISH_SECONDS = 30, 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file written by torch < 1.6


# --- writing ----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Saves in the background: `save` copies the state and returns, a thread writes the copy to the disk.

    The copy's memory is kept from save to save: touching a gigabyte for the first time takes longer than copying it.
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._path = ""  # of the last save

    def save(self, state: Any, path: str, also: str | None = None) -> None:
        """Start to write a state of tensors and plain values to `path`, and link the finished file to `also`.

        Call `wait` first for the save before. If a save fails, an intact file stays at `path`.
        """
        assert self._thread is None, "wait() for the save before"
        self._buffer.seek(0)
        torch.save(state, self._buffer, _use_new_zipfile_serialization=True)  # torch 1.5 has it, but not by default
        self._buffer.truncate()
        self._path = path
        self._thread = threading.Thread(target=self._write, args=(path, also))
        self._thread.start()

    def _write(self, path: str, also: str | None) -> None:
        try:
            with self._buffer.getbuffer() as content:
                _write(content, path, also)
        except Exception as error:  # in a thread: only wait() can tell
            self._error = error

    def wait(self) -> Exception | None:
        """Wait until the last save is on the disk. Returns None, or what it raised (OSError: disk full, …)."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error

    def finish(self) -> None:
        """Give the last save some seconds to reach the disk, before this process ends."""
        if self._thread is not None:
            self._thread.join(timeout=FINISH_SECONDS)

    def wait_or_warn(self, warn: Callable[[str], None]) -> None:
        """Wait until the last save is on the disk; warn if it failed."""
        error = self.wait()
        if error is not None:
            warn(f"{self._path}: checkpoint not saved ({error})")


def _write(content: memoryview, path: str, also: str | None) -> None:
    comment = CHECKSUM_MARK + hashlib.sha256(content).hexdigest().encode()
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content[:-2])  # a zip without a comment ends with the comment's length, two zero bytes
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            link(path, f"{path}.previous")
        try:
            # First, so that a run killed in between finds the older `path`, repeats the epoch and links again.
            if also is not None:
                link(temporary, also)
        finally:
            os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    _flush_folder(path)


def link(path: str, other: str) -> None:
    """Make `other` a second name of the file `path`, replacing what was there; a copy if there are no hard links."""
    temporary = f"{other}.tmp"
    if os.path.exists(temporary):
        os.remove(temporary)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, other)
    finally:
        # Left over if the disk is full, or if both were the same file already: rename then does nothing.
        if os.path.exists(temporary):
            os.remove(temporary)
    _flush_folder(other)


def _flush_folder(path: str) -> None:
    """Flush a file's folder to the disk, so that a rename survives a power cut."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(folder)


def lock_folder(folder: str) -> None:
    """Keep other runs from saving in a folder, until this process ends. Raises UsageError if another run saves there.

    It waits half a minute, for a run that is just ending. Does nothing where the file system has no locks.
    """
    path = os.path.join(folder, ".lock")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by DataLoader workers, unlike flock
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            if time.monotonic() > deadline:
                raise UsageError(
                    f"--output-dir {folder}: another run saves its checkpoints there; wait until it ends, or choose "
                    "another folder"
                ) from error
        time.sleep(0.5)


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str) -> Any:
    """Read a checkpoint: nested dicts and lists of plain values and CPU tensors.

    Verifies the checksum of our own files, and the CRC of each part of others. Raises CheckpointError.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if zipfile.is_zipfile(file):
                _verify_checksum(file, size)
                return _read_zip(file, size)
            file.seek(0)
            if file.read(2) == b"PK":
                raise ValueError("it is truncated")
            file.seek(0)
            return _read_legacy(file, size)
    except CarriesCodeError as error:
        raise CheckpointError(
            f"{path}: refused, it carries code ({error}); nothing in it was run; if you trust it, load it with torch "
            "and save its state_dict alone"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # a corrupt pickle or archive raises nearly any type
        reason = str(error).replace("\n", " ")
        raise CheckpointError(f"{path}: corrupt, or not a checkpoint ({type(error).__name__}: {reason})") from error


def _verify_checksum(file: IO[bytes], size: int) -> None:
    comment = zipfile.ZipFile(file).comment
    file.seek(size - len(comment) - 2)
    if struct.unpack("<H", file.read(2)) != (len(comment),):  # the end of a zip: the comment's length, the comment
        raise ValueError("it is truncated")
    if not comment.startswith(CHECKSUM_MARK):
        return  # not our file: zipfile verifies the CRC of each part that is read
    checksum, left = hashlib.sha256(), size - len(comment) - 2
    file.seek(0)
    while left:
        block = file.read(min(left, 1 << 22))
        if not block:
            raise ValueError("it became shorter while it was read")
        checksum.update(block)
        left -= len(block)
    checksum.update(b"\0\0")
    if checksum.hexdigest().encode() != comment[len(CHECKSUM_MARK) :]:
        raise ValueError("its SHA-256 checksum does not match: it was changed after it was written")


def _read_zip(file: IO[bytes], size: int) -> Any:
    """Read the format of torch >= 1.6: a zip archive with data.pkl and one member per storage."""
    archive = zipfile.ZipFile(file)
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise CarriesCodeError("a TorchScript archive")
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ValueError(f"{info.filename} is compressed or too long, unlike anything that torch.save writes")
    if "data.pkl" not in members:
        raise ValueError("a zip archive without data.pkl")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise ValueError("written on a big-endian machine")

    def fill(key: str, flat: torch.Tensor) -> None:
        content = np.frombuffer(archive.read(members[f"data/{key}"]), np.uint8)
        expected = flat.numel() * flat.element_size()
        if len(content) < expected:
            raise ValueError(f"storage {key}: expected {expected} bytes, got {len(content)}")
        _bytes_of(flat)[...] = content[:expected]

    return load_tensors(io.BytesIO(archive.read(members["data.pkl"])), Storages(size, fill))


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Read the format of torch < 1.6: five pickles in a row, then each storage as its length and raw bytes."""
    storages = Storages(size, fill=lambda key, flat: None)
    if file.read(1) != b"\x80":
        file.seek(257)
        if file.read(5) == b"ustar":
            raise CarriesCodeError("a tar archive of torch 0.1, which may hold any pickle")
        raise ValueError("it does not start like a file of torch.save")
    file.seek(0)
    if load_tensors(file, storages) != LEGACY_MAGIC:
        raise ValueError("a pickle, but not one of torch.save")
    load_tensors(file, storages)  # the protocol version
    if not load_tensors(file, storages).get("little_endian", True):
        raise ValueError("written on a big-endian machine")
    state = load_tensors(file, storages)
    for key in load_tensors(file, storages):
        flat = storages.flat[key]
        (count,) = struct.unpack("<q", file.read(8))
        if count != flat.numel():
            raise ValueError(f"storage {key}: expected {flat.numel()} elements, got {count}")
        content = file.read(flat.numel() * flat.element_size())
        if len(content) != flat.numel() * flat.element_size():
            raise ValueError("it is truncated")
        _bytes_of(flat)[...] = np.frombuffer(content, np.uint8)
    return state


def _bytes_of(flat: torch.Tensor) -> np.ndarray:
    """The memory of a flat CPU tensor as a writable uint8 array. By address, because NumPy knows no bfloat16."""
    count = flat.numel() * flat.element_size()
    if not count:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(flat.data_ptr()))
