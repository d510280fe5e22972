# SPDX-License-Identifier: BSD-3-Clause
"""Lists of images: every way to write one, and the line that is named if it cannot be used."""

from __future__ import annotations

import os
import re
from typing import Any

from engine.data.list_file import read_list
from engine.errors import DataError

import pytest

NAMES = ["a/1.jpg", "a/2.jpg", "b/1, 图.jpg", "b/x y.jpg"]


@pytest.fixture
def root(tmp_path: Any) -> Any:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(root: Any, text: str) -> tuple[list[str], list[str], list[int], list[int]]:
    """(names, classes, labels, parts)"""
    (root / "list.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    listing = read_list(str(root / "list.csv"))
    names = [os.fsdecode(name) for name in listing.names]
    return names, listing.classes, listing.labels.tolist(), listing.parts.tolist()


@pytest.mark.parametrize(
    "text",
    [
        'a/2.jpg,dog\na/1.jpg,cat\n"b/1, 图.jpg",cat\n',
        '\ufeffpath,label\r\na/2.jpg,dog\r\n./a/1.jpg,cat\r\n"b/1, 图.jpg",cat\r\n\r\n',
        'Label,,Path\ndog,0,a/2.jpg\ncat,1,a//1.jpg\ncat,2,"b/1, 图.jpg"',
        "a/2.jpg\tdog\na/1.jpg\tcat\nb/1, 图.jpg\tcat\n",
        'a/2.jpg dog\na/1.jpg  cat \n"b/1, 图.jpg" cat\n',
    ],
    ids=["comma", "header and Windows", "columns by name", "tab", "spaces"],
)
@pytest.mark.parametrize("blank", ["", "\n", "\r\n \r\n", " \t\n" * 3])
def test_a_list_is_read_however_it_is_written(root: Any, text: str, blank: str) -> None:
    text = "\ufeff" * text.startswith("\ufeff") + blank + text.lstrip("\ufeff")
    assert read(root, text) == (["a/2.jpg", "a/1.jpg", "b/1, 图.jpg"], ["cat", "dog"], [1, 0, 0], [])


@pytest.mark.parametrize("train, val", [("train", "val"), ("Training", "VALID")])
def test_a_third_column_splits_the_images_and_those_for_testing_are_left_out(root: Any, train: str, val: str) -> None:
    text = f'path,label,split\na/1.jpg,x,{train}\nmissing.jpg,other,test\na/2.jpg,y,{train}\n"b/x y.jpg",x,{val}\n'
    assert read(root, text) == (["a/1.jpg", "a/2.jpg", "b/x y.jpg"], ["x", "y"], [0, 1, 0], [0, 0, 1])


@pytest.mark.parametrize("text", ["", "\n", " \r\n\n"])
def test_a_list_without_a_row_has_no_classes(root: Any, text: str) -> None:
    assert read(root, text) == ([], [], [], [])


def test_numbers_are_the_numbers_of_classes(root: Any) -> None:
    _, classes, labels, _ = read(root, "a/1.jpg 10\na/2.jpg 2\n")
    assert classes == [str(number) for number in range(11)] and labels == [10, 2]
    assert read(root, "a/1.jpg 10\na/2.jpg x2\n")[1:3] == (["10", "x2"], [0, 1])
    assert read(root, "a/1.jpg 123456\na/2.jpg 2\n")[1:3] == (["123456", "2"], [0, 1])  # a name: too many classes


def test_an_absolute_path_in_the_folder_and_a_name_that_is_not_utf_8_are_taken(root: Any) -> None:
    (root / "\udcff.jpg").write_bytes(b"")
    names = read(root, f"{root}/a/1.jpg,x\n\udcff.jpg,x\n")[0]
    assert names == ["a/1.jpg", "\udcff.jpg"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a/1.jpg,x\na/3.jpg,x\n", "list.csv, line 2: no such file: .*a/3.jpg"),
        ("filename,label\n", "line 1: no such file: .*filename"),
        ("a/1.jpg,x\n\n../a/1.jpg,x\n", "line 3: ../a/1.jpg is outside the folder of the list"),
        ("/etc/passwd,x\n", "line 1: /etc/passwd is outside the folder"),
        ("a/1.jpg,x\na/2.jpg,x\n./a/1.jpg,x\n", "line 3: a/1.jpg is in line 1 already"),
        ("a/1.jpg,x,train\na/2.jpg,y,val\n", "line 2: unknown label 'y': no training image has it"),
        ("a/1.jpg,x,train\na/2.jpg,x,dev\n", "line 2: expected train, val or test, got 'dev'"),
        ("a/1.jpg,x\na/2.jpg,\n", "line 2: expected path, label and maybe split"),
        ("a/1.jpg x\nb/x y.jpg x\n", "line 2: .*quote a path that has spaces or commas"),
        ("a/1.jpg\n", "line 1: expected path, label"),
        ("a/1.jpg,x,train,1\n", "line 1: expected path, label"),
        (",x\n", "line 1: no such file"),
        ('a/1.jpg,x\n"' + 200000 * "a", "line 2: field larger than field limit"),
    ],
)
@pytest.mark.parametrize("blank", [0, 1, 3])
def test_the_line_that_cannot_be_used_is_named(root: Any, text: str, message: str, blank: int) -> None:
    message = re.sub(r"(?<=line )\d", lambda match: str(int(match[0]) + blank), message)
    with pytest.raises(DataError, match=message) as caught:
        read(root, "\n" * blank + text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("blank", ["", "\r\n", "\n\n", " \r\n"])
def test_a_list_from_windows_in_utf_16_gets_one_line(root: Any, encoding: str, blank: str) -> None:
    (root / "list.csv").write_bytes(f"{blank}a/1.jpg,cat\r\n".encode(encoding))
    with pytest.raises(DataError, match="list.csv: this is UTF-16, not UTF-8: save it as UTF-8"):
        read_list(str(root / "list.csv"))
