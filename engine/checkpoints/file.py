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

import concurrent.futures
import ctypes
import errno
import fcntl
import hashlib
import io
import os
import shutil
import struct
import time
import zipfile
from typing import IO, Any

from engine.errors import CheckpointError, CheckpointReadError, UsageError, counted, first_line
from engine.safe_pickle import CarriesCodeError, Storages, load_tensors

import torch

CHECKSUM_MARK = b"sha256:"
LOCK_SECONDS, FINISH_SECONDS = 30, 20
BLOCK_BYTES = 1 << 22  # of a file that is read for its checksum
ZIP_END_BYTES = 1 << 17  # the end of a zip archive, with the longest comment
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file written by torch < 1.6


# --- writing ----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Saves in the background: `save` copies the state and returns, a thread writes the copy to the disk.

    The copy's memory is kept from save to save: touching a gigabyte for the first time takes longer than copying it.
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future[None] | None = None
        self._paths: tuple[str, str | None] = ("", None)

    def save(self, state: Any, path: str, also: str | None = None) -> None:
        """Start to write a state of tensors and plain values to `path`, and link the finished file to `also`.

        Call `wait` first for the save before. If a save fails, an intact file stays at `path`.
        """
        assert self._saving is None, "wait() for the save before"
        self._buffer.seek(0)
        torch.save(state, self._buffer, _use_new_zipfile_serialization=True)  # torch 1.5 has it, but not by default
        self._buffer.truncate()
        self._paths = path, also
        self._saving = self._thread.submit(_write, self._buffer, path, also)

    def wait(self) -> BaseException | None:
        """Wait until the last save is on the disk. Returns None, or what it raised (OSError: disk full, …).

        A save that failed and has an `also` is tried once more, here: no later save has its weights.
        """
        saving, self._saving = self._saving, None
        error = None if saving is None else saving.exception()
        if error is not None and self._paths[1] is not None:
            error = self._thread.submit(_write, self._buffer, *self._paths).exception()
        return error

    def finish(self) -> None:
        """Give the last save some seconds to reach the disk, before this process ends."""
        if self._saving is not None:
            concurrent.futures.wait([self._saving], timeout=FINISH_SECONDS)


def _write(buffer: io.BytesIO, path: str, also: str | None) -> None:
    temporary = f"{path}.tmp"
    try:
        if os.path.exists(temporary):  # of a save that was killed, and maybe a second name of `also` already
            os.remove(temporary)
        with open(temporary, "wb") as file, buffer.getbuffer() as content:
            comment = CHECKSUM_MARK + hashlib.sha256(content).hexdigest().encode()
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
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
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
    for attempt in range(2 * LOCK_SECONDS + 1):
        time.sleep(0.5 if attempt else 0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by DataLoader workers, unlike flock
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
    raise UsageError(
        f"--output-dir {folder}: another run saves its checkpoints there; wait until it ends, or choose another folder"
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str) -> Any:
    """Read a checkpoint: nested dicts and lists of plain values and CPU tensors.

    Verifies the checksum of our own files, and the CRC of each part of others. Raises CheckpointError,
    CheckpointReadError if the system cannot read the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(2) != b"PK":
                return _read_legacy(file, size)
            file.seek(max(0, size - ZIP_END_BYTES))
            file.read()  # a disk's error shows here; zipfile would take it for a file that is not a zip
            if not zipfile.is_zipfile(file):
                raise ValueError("it is truncated")
            return _read_zip(file, size)
    except CarriesCodeError as error:
        raise CheckpointError(
            f"{path}: refused, it carries code ({error}); nothing in it was run; if you trust it, load it with torch "
            "and save its state_dict alone"
        ) from error
    except MemoryError as error:
        raise CheckpointReadError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # a corrupt pickle or archive raises nearly any type
        # EINVAL: a corrupt zip has told zipfile to read before the start of the file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointReadError(f"{path}: {error.strerror or error}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: corrupt, or not a checkpoint ({reason})") from error


def sha256(file: IO[bytes], size: int) -> Any:
    """Return hashlib's SHA-256 of the first `size` bytes of a file."""
    checksum = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, BLOCK_BYTES):
        checksum.update(file.read(min(BLOCK_BYTES, size - start)))
    return checksum


def _verify_checksum(file: IO[bytes], size: int, comment: bytes) -> None:
    """Raise ValueError if a zip does not end with the comment, or if the comment is another content's checksum."""
    end = size - len(comment) - 2  # the end of a zip: the comment's length, the comment
    file.seek(end)
    if file.read(2) != struct.pack("<H", len(comment)):
        raise ValueError("it is truncated")
    if not comment.startswith(CHECKSUM_MARK):
        return  # not our file: zipfile verifies the CRC of each part that is read
    checksum = sha256(file, end)
    checksum.update(b"\0\0")
    if checksum.hexdigest().encode() != comment[len(CHECKSUM_MARK) :]:
        raise ValueError("its SHA-256 checksum does not match: it was changed after it was written")


def _read_zip(file: IO[bytes], size: int) -> Any:
    """Read the format of torch >= 1.6: a zip archive with data.pkl and one member per storage."""
    archive = zipfile.ZipFile(file)
    _verify_checksum(file, size, archive.comment)
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
    storages = Storages(size, fill=lambda key, flat: _fill(flat, archive.read(members[f"data/{key}"])))
    return load_tensors(io.BytesIO(archive.read(members["data.pkl"])), storages)


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Read the format of torch < 1.6: five pickles in a row, then each storage as its length and raw bytes."""
    file.seek(0)
    start = file.read(262)
    if start[:1] != b"\x80":
        if start[257:] == b"ustar":
            raise CarriesCodeError("a tar archive of torch 0.1, which may hold any pickle")
        raise ValueError("it does not start like a file of torch.save")
    file.seek(0)
    storages = Storages(size, fill=lambda key, flat: None)
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
            raise ValueError(f"storage {key}: expected a length of {flat.numel()}, got {count}")
        _fill(flat, file.read(flat.numel() * flat.element_size()))
    return state


def _fill(flat: torch.Tensor, content: bytes) -> None:
    """Set the bytes of a flat CPU tensor. By address, because NumPy knows no bfloat16."""
    expected = flat.numel() * flat.element_size()
    if len(content) < expected:
        raise ValueError(f"a storage: expected {counted(expected, 'byte')}, got {len(content)}")
    ctypes.memmove(flat.data_ptr(), content, expected)
