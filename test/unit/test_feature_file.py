# SPDX-License-Identifier: BSD-3-Clause
"""FILE.npy and FILE.txt: whole, or not there."""

from __future__ import annotations

import os
import tracemalloc
from collections import namedtuple
from typing import Any

from engine.errors import UsageError
from engine.records import feature_file

import numpy as np
import pytest


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
@pytest.mark.parametrize("expected", [5, 12, 10**9])
def test_the_rows_are_those_added_however_many_were_expected(
    tmp_path: Any, monkeypatch: Any, shape: tuple[int, ...], expected: int
) -> None:
    """Fewer if images cannot be read. The header has its place before the number of rows is known."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(10**15))
    values = np.arange(5 * np.prod(shape), dtype=np.float32).reshape(5, *shape)
    with feature_file.write(str(tmp_path / "a.b.npy"), expected) as add:
        add(["a/1.jpg", "图 2.jpg"], values[:2])
        add(["3\n.jpg", "4\u2028\r\x85\x0c.jpg", "5\udce9.jpg"], values[2:].transpose().copy().transpose())
    assert sorted(os.listdir(str(tmp_path))) == ["a.b.npy", "a.b.txt"]
    for mode in (None, "r"):
        loaded = np.load(str(tmp_path / "a.b.npy"), mmap_mode=mode)
        assert loaded.dtype == np.float32 and loaded.flags.c_contiguous and np.array_equal(loaded, values)
    names = (tmp_path / "a.b.txt").read_text(encoding="utf-8").splitlines()
    assert names == ["a/1.jpg", "图 2.jpg", "3\\n.jpg", "4\\u2028\\r\\x85\\x0c.jpg", "5\\xe9.jpg"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError, RuntimeError])
def test_an_error_leaves_what_was_there_before(tmp_path: Any, error: type) -> None:
    path = str(tmp_path / "x.npy")

    def fail() -> None:
        with pytest.raises(error), feature_file.write(path, 2) as add:
            add(["new"], np.zeros((1, 3), np.float32))
            assert {"x.npy.part", "x.txt.part"} <= set(os.listdir(str(tmp_path)))
            raise error

    fail()
    assert os.listdir(str(tmp_path)) == []
    with feature_file.write(path, 1) as add:
        add(["old"], np.ones((1, 3), np.float32))
    fail()
    assert sorted(os.listdir(str(tmp_path))) == ["x.npy", "x.txt"]
    assert np.load(path).tolist() == [[1, 1, 1]] and (tmp_path / "x.txt").read_text() == "old\n"


def test_no_row_is_no_file(tmp_path: Any) -> None:
    with feature_file.write(str(tmp_path / "x.npy"), 2):
        pass
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("part", ["x.npy.part", "x.txt.part"])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Any, part: str, size: int) -> None:
    """It shows at a row, or when what Python has buffered is written at the end."""
    (tmp_path / part).symlink_to("/dev/full")
    message = r"--output .*x.npy: No space left on device$"
    with pytest.raises(UsageError, match=message), feature_file.write(str(tmp_path / "x.npy"), 1) as add:
        add(["name"], np.zeros((1, size), np.float32))
    assert os.listdir(str(tmp_path)) == []


def test_a_disk_that_will_be_full_is_said_at_the_first_row(tmp_path: Any) -> None:
    message = r"x.npy: all rows take 40,000,000\.0 GB, [\d,.]+ GB are free: choose "
    with pytest.raises(UsageError, match=message), feature_file.write(str(tmp_path / "x.npy"), 10**16) as add:
        add(["name"], np.zeros((1, 1), np.float32))
    assert os.listdir(str(tmp_path)) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Any) -> None:
    message = r"--output .*/no/x.npy: No such file or directory"
    with pytest.raises(UsageError, match=message), feature_file.write(str(tmp_path / "no" / "x.npy"), 1):
        pass


def test_memory_does_not_grow_with_the_rows(tmp_path: Any) -> None:
    batch = np.zeros((16, 1 << 14), np.float32)  # 1 MB
    tracemalloc.start()
    try:
        with feature_file.write(str(tmp_path / "x.npy"), 64 * 16) as add:
            for number in range(64):
                add([str(number)] * 16, batch)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert os.path.getsize(str(tmp_path / "x.npy")) == 128 + 64 * batch.nbytes
