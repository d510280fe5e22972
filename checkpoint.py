# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files that survive, and a reader that runs nothing of what it reads.

Writing: the state is copied to memory, then, in the background, written under a temporary name, synchronised to the disk and renamed, so that
a complete file exists at every moment; the one before is kept as `*.previous`. The file is what torch.save writes, with
its SHA-256 in the comment field that ends a zip archive: torch.load reads it as ever, `load` verifies it.

Reading: torch.load is not used. On torch before 2.10 it can run code even with weights_only (CVE-2025-32434,
CVE-2026-24747), and it does not exist before 1.13. `load` reads torch's zip format and the older format of torch < 1.6,
with an unpickler that knows tensors and plain values and imports no name.
"""
import ctypes
import hashlib
import io
import os
import pickle
import shutil
import struct
import threading
import zipfile
from collections import OrderedDict

import numpy as np
import torch

DIGEST_MARK = b'sha256:'
COMMENT_SIZE = len(DIGEST_MARK) + 64
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c  # first pickle of a file that torch < 1.6 wrote


class BadCheckpoint(Exception):
    """A file that is damaged, is no checkpoint, or carries code; the text names it and says which."""


# --- writing ----------------------------------------------------------------------------------------------------------

class Writer:
    """Saves in the background: `save` copies the state and returns, a thread writes the copy to the disk.

    The copy's memory is kept from save to save: touching a gigabyte for the first time takes longer than copying it.
    """

    def __init__(self):
        self._buffer, self._thread, self._error = io.BytesIO(), None, None

    def save(self, state, path, also=None):
        """Begin to write a state of tensors and plain values to `path`, and let `also` name the finished file too.

        Waits for the save before. `wait` tells how it went: a failure leaves the file that was there and no other.
        """
        assert self._thread is None, 'wait() for the save before'
        self._buffer.seek(0)
        # torch 1.5 has the format, but not by default.
        torch.save(state, self._buffer, _use_new_zipfile_serialization=True)
        self._buffer.truncate()
        self._thread = threading.Thread(target=self._write, args=(path, also))
        self._thread.start()

    def _write(self, path, also):
        try:
            with self._buffer.getbuffer() as content:
                _write(content, path)
            if also is not None:
                link(path, also)
        except (OSError, MemoryError) as error:
            self._error = error

    def wait(self):
        """Wait until the last save is on the disk. Returns None, or its OSError (disk full, …) or MemoryError."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error


def _write(content, path):
    comment = DIGEST_MARK + hashlib.sha256(content).hexdigest().encode()
    temporary = path + '.tmp'
    try:
        with open(temporary, 'wb') as file:
            file.write(content[:-2])  # the last two bytes of a zip without comment are the comment's length, 0
            file.write(struct.pack('<H', len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            link(path, path + '.previous')
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    _sync_folder(path)


def link(path, other):
    """Let `other` name the same complete file as `path`, replacing what was there; a copy where links are unknown."""
    temporary = other + '.tmp'
    if os.path.exists(temporary):
        os.remove(temporary)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
        os.replace(temporary, other)
    finally:
        if os.path.exists(temporary):  # a full disk; or both were one file before, which rename then leaves as it is
            os.remove(temporary)
    _sync_folder(other)


def _sync_folder(path):
    """Make a rename last through a power cut."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- reading ----------------------------------------------------------------------------------------------------------

def load(path):
    """Read a checkpoint: nested dicts and lists of plain values and CPU tensors.

    Verifies the digest of our own files, and the zip checksums of others. Raises BadCheckpoint.
    """
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            if zipfile.is_zipfile(file):
                _verify_digest(file, size)
                return _read_zip(file, size)
            file.seek(0)
            if file.read(2) == b'PK':
                raise ValueError('it is cut short')
            file.seek(0)
            return _read_legacy(file, size)
    except _CarriesCode as error:
        raise BadCheckpoint('{}: refused, it carries code ({}); nothing of it was run'.format(path, error))
    except OSError as error:
        raise BadCheckpoint('{}: {}'.format(path, error.strerror or error))
    except MemoryError:
        raise BadCheckpoint('{}: not enough memory to read it'.format(path))
    except Exception as error:  # a damaged pickle or archive raises nearly anything
        raise BadCheckpoint('{}: damaged, or no checkpoint ({}: {})'.format(
            path, type(error).__name__, str(error).replace('\n', ' ')))


class _CarriesCode(Exception):
    pass


def _verify_digest(file, size):
    file.seek(max(0, size - COMMENT_SIZE))
    comment = file.read()
    if not comment.startswith(DIGEST_MARK):
        if not comment.endswith(b'\0\0') and zipfile.ZipFile(file).comment != comment[-COMMENT_SIZE:]:
            raise ValueError('it is cut short')  # the end of an archive without comment is its length, 0
        return  # not ours: zipfile checks each part's CRC as it is read
    digest, left = hashlib.sha256(), size - COMMENT_SIZE - 2
    file.seek(0)
    while left:
        block = file.read(min(left, 1 << 22))
        digest.update(block)
        left -= len(block)
    digest.update(b'\0\0')
    if digest.hexdigest().encode() != comment[len(DIGEST_MARK):]:
        raise ValueError('its SHA-256 does not match: it was changed after it was written')


def _read_zip(file, size):
    archive = zipfile.ZipFile(file)
    members = {}
    for info in archive.infolist():
        members[info.filename.partition('/')[2]] = info
    if 'constants.pkl' in members or any(name.startswith('code/') for name in members):
        raise _CarriesCode('a TorchScript archive')
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ValueError('{} is compressed or too long, which torch.save makes neither'.format(info.filename))
    if 'data.pkl' not in members:
        raise ValueError('a zip file without data.pkl')
    if 'byteorder' in members and archive.read(members['byteorder']) != b'little':
        raise ValueError('written on a big-endian machine')

    def fill(key, flat):
        content = np.frombuffer(archive.read(members['data/' + key]), np.uint8)
        _bytes_of(flat)[...] = content[:flat.numel() * flat.element_size()]

    storages = _Storages(size, fill)
    return _Unpickler(io.BytesIO(archive.read(members['data.pkl'])), storages).load()


def _read_legacy(file, size):
    """The format of torch < 1.6: five pickles in a row, then each storage as its length and raw bytes."""
    storages = _Storages(size, fill=lambda key, flat: None)

    def next_pickle():
        return _Unpickler(file, storages).load()

    if file.read(1) != b'\x80':
        file.seek(257)
        if file.read(5) == b'ustar':
            raise _CarriesCode('a tar archive of torch 0.1, which may hold any pickle')
        raise ValueError('it begins like no file of torch.save')
    file.seek(0)
    if next_pickle() != LEGACY_MAGIC:
        raise ValueError('a pickle, but not one of torch.save')
    next_pickle()  # protocol version
    if not next_pickle().get('little_endian', True):
        raise ValueError('written on a big-endian machine')
    state = next_pickle()
    for key in next_pickle():
        flat = storages.flat[key]
        count, = struct.unpack('<q', file.read(8))
        if count != flat.numel():
            raise ValueError('storage {} has {} elements in place of {}'.format(key, count, flat.numel()))
        if file.readinto(memoryview(_bytes_of(flat))) != flat.numel() * flat.element_size():
            raise ValueError('it is cut short')
    return state


DTYPES = {'FloatStorage': torch.float32, 'DoubleStorage': torch.float64, 'HalfStorage': torch.float16,
          'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
          'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
          'BoolStorage': torch.bool}
ITEM_SIZES = {torch.float32: 4, torch.float64: 8, torch.float16: 2, torch.bfloat16: 2, torch.int64: 8, torch.int32: 4,
              torch.int16: 2, torch.int8: 1, torch.uint8: 1, torch.bool: 1}


def _bytes_of(flat):
    """The memory of a flat CPU tensor as a writable uint8 array; NumPy knows no bfloat16, so by address."""
    count = flat.numel() * flat.element_size()
    if not count:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * count).from_address(flat.data_ptr()), np.uint8)


class _Storages:
    """The flat tensors that a file's tensors are views of. Together they are never larger than the file."""

    def __init__(self, size, fill):
        self.left, self.fill, self.flat = size, fill, {}

    def get(self, dtype, key, count):
        if key not in self.flat:
            self.left -= count * ITEM_SIZES[dtype]
            if count < 0 or self.left < 0:
                raise ValueError('it claims more data than it holds')
            self.flat[key] = torch.empty(count, dtype=dtype)
            self.fill(key, self.flat[key])
        return self.flat[key]


class _Unpickler(pickle._Unpickler):
    """Builds dicts, lists, numbers, strings and tensors. Every name a pickle may use is answered from the table below;
    none is imported. (Python's own unpickler in Python: the one in C takes memory for any memo number it reads.)"""

    def __init__(self, file, storages):
        super().__init__(file, encoding='latin1')
        self.storages = storages
        self.names = {
            ('collections', 'OrderedDict'): OrderedDict,
            ('torch', 'Size'): tuple,
            ('torch._utils', '_rebuild_tensor'): _tensor,
            ('torch._utils', '_rebuild_tensor_v2'): _tensor,
            ('torch._utils', '_rebuild_parameter'): lambda data, requires_grad, hooks: data,
            # What torch_npu and torch write for tensors of an NPU.
            ('torch_npu.utils.storage', '_rebuild_npu_tensor'): _tensor,
            ('torch._utils', '_rebuild_device_tensor_from_cpu_tensor'): lambda data, *dtype_and_device: data,
        }

    def find_class(self, module, name):
        if (module, name) in self.names:
            return self.names[module, name]
        if module in ('torch', 'torch.cuda', 'torch.npu') and name in DTYPES:
            return DTYPES[name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _CarriesCode('it calls {}.{}'.format(module, name))

    def persistent_load(self, identifier):
        kind, dtype, key, _, count = identifier[:5]
        if kind != 'storage' or dtype not in ITEM_SIZES:
            raise ValueError('an unknown reference')
        flat = self.storages.get(dtype, str(key), int(count))
        view = identifier[5] if len(identifier) > 5 else None  # (key, offset, size) in the older format
        return flat if view is None else flat[view[1]:view[1] + view[2]]

    # An object that brings its own state (`__setstate__`) or constructor gets neither.
    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):  # the metadata that torch hangs onto a state_dict is dropped
            raise _CarriesCode('it sets the state of a {}'.format(type(self.stack[-1]).__name__))
        del state

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.BUILD[0]] = load_build


def _tensor(flat, offset, size, stride, *_):
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if offset < 0 or min(tuple(size) + tuple(stride) + (0,)) < 0 or (0 not in size and last >= flat.numel()):
        raise ValueError('a tensor reaches outside its storage')
    return flat.as_strided(tuple(size), tuple(stride), offset)
