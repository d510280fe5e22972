# SPDX-License-Identifier: BSD-3-Clause
"""A restricted unpickler: it builds plain values, arrays and tensors, and imports nothing that a pickle names."""

from __future__ import annotations

import functools
import operator
import pickle
from collections import OrderedDict
from typing import IO, Any, Callable

import numpy as np
import torch

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CarriesCodeError(Exception):
    """The pickle names something to call that is not in the table of harmless names."""


class SafeUnpickler(pickle._Unpickler):
    """Builds dicts, lists, numbers and strings, and whatever `names` maps to.

    This is Python's unpickler written in Python: the one in C allocates memory for any memo number that it reads.

    Args:
        names: {(module, name): what stands for it}.
        resolve: returns what stands for a persistent id; None refuses them.
    """

    def __init__(
        self,
        file: IO[bytes],
        names: dict[tuple[str, str], Any],
        resolve: Callable[[Any], Any] | None = None,
        encoding: str = "latin1",
    ) -> None:
        super().__init__(file, encoding=encoding)
        self.names, self.resolve = names, resolve
        self.stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise CarriesCodeError(f"it calls {module}.{name}") from None

    def persistent_load(self, identifier: Any) -> Any:
        if self.resolve is None:
            raise pickle.UnpicklingError("it refers to data outside the pickle")
        return self.resolve(identifier)

    def load_build(self) -> None:
        """Opcode BUILD: set the state of an object. Only our own stand-ins get one."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _PickledArray):
            target.set_state(state)
        elif not isinstance(target, (OrderedDict, _Dropped)):  # torch attaches metadata to a state_dict: dropped
            raise CarriesCodeError(f"it sets the state of a {type(target).__name__}")

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]


# --- arrays -----------------------------------------------------------------------------------------------------------


class _PickledArray:
    """Stands for a NumPy array, its dtype and its constructor: takes the shape and the bytes, nothing else."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, _, fortran_order, content = state
            content = content.encode("latin1") if isinstance(content, str) else content
            self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran_order else "C")

    @staticmethod
    def from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
        array = _PickledArray()
        array.set_state((1, shape, dtype, order == "F", content))
        return array


def load_arrays(file: IO[bytes]) -> Any:
    """Read a dict of numbers, strings, lists and uint8 arrays, such as a file of CIFAR-10. Raises CarriesCodeError."""
    names = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy.core.numeric", "_frombuffer"): _PickledArray.from_buffer,  # pickle protocol 5
        ("numpy._core.numeric", "_frombuffer"): _PickledArray.from_buffer,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledArray,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # protocol 2 writes bytes so
    }
    record = SafeUnpickler(file, names, encoding="bytes").load()
    return {key: value.array if isinstance(value, _PickledArray) else value for key, value in record.items()}


class _Dropped:
    """Stands for what others save beside the weights, and nobody reads here: flags, numbers of NumPy, milestones, …"""

    def __init__(self, *_: Any) -> None:
        pass


DROPPED = {
    "argparse": ["Namespace"],
    "builtins": ["set"],
    "__builtin__": ["set"],
    "collections": ["Counter"],  # of MultiStepLR
    "pathlib": ["PosixPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "WindowsPath"],
    "torch": ["device"],
    "numpy": ["dtype", "ndarray"],
    "numpy.core.multiarray": ["scalar", "_reconstruct"],
    "numpy.core.numeric": ["_frombuffer"],  # pickle protocol 5
    "numpy._core.multiarray": ["scalar", "_reconstruct"],
    "numpy._core.numeric": ["_frombuffer"],
    "_codecs": ["encode"],
}


# --- tensors ----------------------------------------------------------------------------------------------------------


class Storages:
    """The flat tensors that a file's tensors are views of. Together they are never larger than the file.

    fill(key, flat): reads the bytes of a storage.
    """

    def __init__(self, size: int, fill: Callable[[str, torch.Tensor], None]) -> None:
        self.bytes_left, self.fill = size, fill
        self.flat: dict[str, torch.Tensor] = {}

    def get(self, dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        if key not in self.flat:
            self.bytes_left -= count * torch.empty(0, dtype=dtype).element_size()
            if count < 0 or self.bytes_left < 0:
                raise ValueError("it claims more data than it holds")
            self.flat[key] = torch.empty(count, dtype=dtype)
            self.fill(key, self.flat[key])
        return self.flat[key]

    def persistent_load(self, identifier: Any) -> torch.Tensor:
        """Resolve ('storage', type, key, location, count), in the older format with None behind it."""
        kind, dtype, key, _, count = identifier[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("an unknown kind of persistent id")
        if len(identifier) > 5 and identifier[5] is not None:
            raise ValueError("a view of a storage, which only torch before 0.4 wrote")
        return self.get(dtype, str(key), int(count))


def rebuild_tensor(flat: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """Return a view of a storage. Raises ValueError if it reaches outside, or has more elements (by a stride of 0)."""
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if offset < 0 or min((*size, *stride, 0)) < 0 or (0 not in size and last >= flat.numel()):
        raise ValueError("a tensor reaches outside its storage")
    if functools.reduce(operator.mul, size, 1) > flat.numel():
        raise ValueError("it claims more data than it holds")
    return flat.as_strided(tuple(size), tuple(stride), offset)


def load_tensors(file: IO[bytes], storages: Storages) -> Any:
    """Read one pickle of torch.save: nested dicts and lists of plain values and tensors. Raises CarriesCodeError."""
    names: dict[tuple[str, str], Any] = {
        **{(module, name): _Dropped for module, dropped in DROPPED.items() for name in dropped},
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
        # torch_npu and torch write these for tensors of an NPU.
        ("torch_npu.utils.storage", "_rebuild_npu_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): lambda data, *dtype_and_device: data,
    }
    for name, dtype in DTYPES.items():
        for module in ("torch", "torch.cuda", "torch.npu"):
            names[module, name] = dtype
        names["torch", str(dtype).partition(".")[2]] = dtype
    return SafeUnpickler(file, names, storages.persistent_load).load()
