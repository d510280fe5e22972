# SPDX-License-Identifier: BSD-3-Clause
"""The reader of pickles builds plain values, arrays and tensors, and runs nothing that a pickle names."""

import io
import os
import pickle
import tracemalloc
from collections import OrderedDict

from engine.safe_pickle import CarriesCodeError, Storages, load_arrays, load_tensors, rebuild_tensor

import numpy as np
import pytest
import torch


def read_arrays(content):
    return load_arrays(io.BytesIO(content))


def read_tensors(content):
    return load_tensors(io.BytesIO(content), Storages(1000, fill=lambda key, flat: None))


READERS = pytest.mark.parametrize("read", [read_arrays, read_tensors])


# --- what carries code ------------------------------------------------------------------------------------------------


def call(opcode, module, name, argument):
    """A pickle that calls module.name(argument)."""
    module, name, argument = module.encode(), name.encode(), argument.encode()
    if opcode == "STACK_GLOBAL":
        words = [b"\x8c" + bytes([len(word)]) + word for word in (module, name)]
        return b"\x80\x04" + b"".join(words) + b"\x93(V" + argument + b"\ntR."
    if opcode == "INST":
        return b"(V" + argument + b"\ni" + module + b"\n" + name + b"\n."
    return b"c" + module + b"\n" + name + b"\n(V" + argument + b"\ntR."


@READERS
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL", "INST"])
@pytest.mark.parametrize(
    "module, name, argument",
    [
        ("os", "system", "mkdir canary"),
        ("os", "mkdir", "canary"),
        ("builtins", "eval", "__import__('os').mkdir('canary')"),
    ],
    ids=["os.system", "os.mkdir", "builtins.eval"],
)
def test_a_pickle_that_calls_something_is_refused_and_runs_nothing(
    tmp_path, monkeypatch, read, opcode, module, name, argument
):
    monkeypatch.chdir(tmp_path)
    content = call(opcode, module, name, argument)
    with pytest.raises(CarriesCodeError, match=f"it calls {module}.{name}"):
        read(content)
    assert os.listdir(".") == []
    pickle.loads(content)
    assert os.listdir(".") == ["canary"]  # that is what it does to a reader that is not safe


class WithState:
    """Runs code by way of __setstate__."""

    def __setstate__(self, state):
        raise AssertionError("the state was set")


@READERS
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_class_with_setstate_is_refused(read, protocol):
    hostile = WithState()
    hostile.x = 1
    with pytest.raises(CarriesCodeError):
        read(pickle.dumps({"x": hostile}, protocol))


@pytest.mark.parametrize(
    "read, target, kind",
    [
        (read_arrays, b"}", "dict"),
        (read_tensors, b"]", "list"),
        (read_arrays, b"c_codecs\nencode\n", "function"),
        (read_tensors, b"ctorch._utils\n_rebuild_tensor_v2\n", "function"),
        (read_arrays, b"cnumpy\nndarray\n", "type"),
        (read_tensors, b"ccollections\nOrderedDict\n", "type"),
        (read_tensors, b"ctorch\nFloatStorage\n", "dtype"),
    ],
    ids=range(7),
)
def test_a_pickle_that_sets_the_state_of_a_foreign_object_is_refused(read, target, kind):
    with pytest.raises(CarriesCodeError, match=f"it sets the state of a {kind}"):
        read(target + b"}Vx\nI1\nsb.")
    assert not hasattr(rebuild_tensor, "x")


def test_the_metadata_of_a_state_dict_is_dropped():
    weights = OrderedDict(a=1.5)
    weights._metadata = {"": {"version": 1}}
    loaded = read_tensors(pickle.dumps(weights, 2))
    assert loaded == {"a": 1.5} and not hasattr(loaded, "_metadata")


@READERS
@pytest.mark.parametrize("opcode", ["PERSID", "BINPERSID"])
def test_a_persistent_id_that_is_not_expected_is_refused(read, opcode):
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        read(b"Pstorage\n." if opcode == "PERSID" else b"Vstorage\nQ.")


def test_arrays_have_no_persistent_ids():
    with pytest.raises(pickle.UnpicklingError, match="outside the pickle"):
        read_arrays(b"}V0\nQ.")


@pytest.mark.parametrize(
    "identifier",
    [("module", torch.float32, "0", "cpu", 1), ("storage", "float", "0", "cpu", 1), ("storage", os.system)],
)
def test_a_persistent_id_must_be_a_storage(identifier):
    storages = Storages(1000, fill=lambda key, flat: None)
    with pytest.raises(ValueError):
        storages.persistent_load(identifier)
    assert storages.flat == {}


def test_a_view_of_a_storage_is_refused():
    storages = Storages(1000, fill=lambda key, flat: None)
    identifier = ("storage", torch.float32, "0", "cpu", 10)
    assert len(storages.persistent_load((*identifier, None))) == 10
    with pytest.raises(ValueError, match="a view of a storage"):
        storages.persistent_load((*identifier, ("1", 2, 3)))


@READERS
def test_a_large_memo_number_takes_no_memory(read):
    """Python's own unpickler in C allocates memory for all numbers up to it."""
    tracemalloc.start()
    try:
        assert read(b"\x80\x02}r\xff\xff\xff\x0f.") == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read(protocol, order):
    pixels = np.asarray(np.arange(600, dtype=np.uint16).reshape(20, 30) % 256, np.uint8, order=order)
    record = {"data": pixels, "labels": [1, 2], "name": "图", "none": None, "rate": 0.5}
    loaded = read_arrays(pickle.dumps(record, protocol))
    assert np.array_equal(loaded.pop("data"), pixels)
    assert loaded == {"labels": [1, 2], "name": "图", "none": None, "rate": 0.5}


def test_a_tensor_that_reaches_outside_its_storage_is_refused():
    storages = Storages(1000, lambda key, flat: None)
    flat = storages.get(torch.float32, "0", 10)
    outside = [(0, (11,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (9, 1)), (0, (3,), (-1,)), (0, (-1,), (1,))]
    for offset, size, stride in outside:
        with pytest.raises(ValueError, match="outside its storage"):
            rebuild_tensor(flat, offset, size, stride)
    assert rebuild_tensor(flat, 1, (3, 3), (3, 1)).shape == (3, 3)
    assert rebuild_tensor(flat, 0, (0, 4), (4, 1)).shape == (0, 4)


def test_storages_are_never_larger_than_the_file():
    storages = Storages(1000, lambda key, flat: None)
    assert len(storages.get(torch.float32, "0", 200)) == 200
    for count in (51, 1 << 40, -1):
        with pytest.raises(ValueError, match="more data"):
            Storages(1000 - 800, lambda key, flat: None).get(torch.float32, "1", count)
    with pytest.raises(ValueError, match="more data"):
        storages.get(torch.float32, "1", 51)


def test_a_tensor_that_repeats_its_storage_beyond_its_size_is_refused():
    """A stride of 0 would let a small file claim terabytes."""
    flat = torch.arange(4.0)
    assert rebuild_tensor(flat, 0, (2, 2), (0, 1)).tolist() == [[0.0, 1.0], [0.0, 1.0]]
    for size in ((10**12,), (5, 1)):
        with pytest.raises(ValueError, match="more data"):
            rebuild_tensor(flat, 0, size, (0,) * len(size))
