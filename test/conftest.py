# SPDX-License-Identifier: BSD-3-Clause
"""What pytest sets up for all tests. What tests share is in test/helpers."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # as engine does, before any test imports torch
TEST = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TEST), TEST]

from helpers.images import make_folder  # noqa: E402  sys.path comes first


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--skip-once", action="store_true", help="skip the tests that are marked once")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.getoption("--skip-once"):
        for item in items:
            if item.get_closest_marker("once"):
                item.add_marker(pytest.mark.skip(reason="is the same on any torch, and ran on the first"))


def pytest_configure(config: Any) -> None:
    """If tests run side by side (pytest -n), give each worker and what it starts its share of the cores."""
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        shares = min(worker["workercount"], len(cores))
        os.sched_setaffinity(0, set(cores[int(worker["workerid"][2:]) % shares :: shares]))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: Any) -> None:
    """The indexes of the tests' folders go to a cache folder of their own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> str:
    """A folder of JPEGs, its name with a space: 3 classes, 24 training and 15 validation images."""
    return make_folder(tmp_path_factory.mktemp("a folder"))


@pytest.fixture(scope="session")
def folder37(tmp_path_factory: Any) -> str:
    """37 validation images in 2 classes: a prime number, so that no batch size divides it."""
    root = tmp_path_factory.mktemp("thirty-seven")
    make_folder(root, classes=2, train=8, val=19)
    os.remove(os.path.join(str(root), "val", "class 1", "图 018.JPEG"))
    return str(root)


@pytest.fixture(params=["Pillow", "simplejpeg"])
def decoder(request: Any, monkeypatch: Any) -> str:
    """The decoder of JPEGs."""
    from engine.data import transforms

    if request.param == "Pillow":
        monkeypatch.setattr(transforms, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param
