# SPDX-License-Identifier: BSD-3-Clause
"""What a run starts from: a checkpoint in its folder, or torchvision's weights from a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import threading
from typing import Any, Iterator

from engine.checkpoints import start
from engine.checkpoints.contents import LATEST, load_checkpoint
from engine.checkpoints.file import CheckpointWriter
from engine.checkpoints.start import find_checkpoint
from engine.errors import CheckpointError, UsageError
from engine.parallel.launcher import free_port
from engine.records.logger import Logger
from helpers.program import start_main

import pytest

CONTENT = b"weights" * 1000
NAME = f"vgg16-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def logger() -> Logger:
    return Logger(writes=False)


def save(state: Any, path: Any) -> str:
    writer = CheckpointWriter()
    writer.save(state, str(path))
    assert writer.wait() is None
    return str(path)


# --- finding a checkpoint ---------------------------------------------------------------------------------------------


def test_auto_resume_takes_the_newest_intact_checkpoint(tmp_path: Any, logger: Logger, capsys: Any) -> None:
    assert find_checkpoint(None, True, str(tmp_path), logger) is None
    path = tmp_path / LATEST
    for epoch in (1, 2):
        save({"epoch": epoch}, path)
    assert find_checkpoint(None, True, str(tmp_path), logger) == {"epoch": 2}
    assert find_checkpoint(None, False, str(tmp_path), logger) is None
    assert capsys.readouterr().out == f"=> resuming from '{path}'\n"
    path.write_bytes(path.read_bytes()[:-9])
    assert find_checkpoint(None, True, str(tmp_path), logger) == {"epoch": 1}
    printed = capsys.readouterr()
    assert printed.out == f"=> resuming from '{path}.previous'\n"
    assert f"warning: {path}: corrupt" in printed.err and "trying the one before it" in printed.err
    # The next save must not keep the corrupt file in place of the intact one.
    assert not path.exists() and (tmp_path / f"{LATEST}.corrupt").exists()
    save({"epoch": 3}, path)
    assert (load_checkpoint(str(path)), load_checkpoint(f"{path}.previous")) == ({"epoch": 3}, {"epoch": 1})


def test_a_file_system_that_fails_is_no_fresh_start(tmp_path: Any, logger: Logger, monkeypatch: Any) -> None:
    def fail(folder: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(start.os, "listdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find_checkpoint(None, True, str(tmp_path), logger)


def test_auto_resume_never_starts_afresh_over_corrupt_checkpoints(tmp_path: Any, logger: Logger) -> None:
    for name in (LATEST, f"{LATEST}.previous"):
        (tmp_path / name).write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match="corrupt, or not a checkpoint"):
        find_checkpoint(None, True, str(tmp_path), logger)


def test_a_checkpoint_that_was_asked_for_must_be_intact(tmp_path: Any, logger: Logger) -> None:
    path = save({"epoch": 1}, tmp_path / "x")
    assert find_checkpoint(path, True, str(tmp_path), logger) == {"epoch": 1}
    (tmp_path / "x").write_bytes(b"corrupt")
    save({"epoch": 2}, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="x: corrupt"):
        find_checkpoint(path, True, str(tmp_path), logger)


def test_a_checkpoint_that_rank_0_does_not_have_is_no_fresh_start(folder: str, tmp_path: Any) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    flags = [
        folder,
        "--arch",
        "vgg11",
        "--image-size",
        32,
        "-b",
        6,
        "--epochs",
        1,
        "--world-size",
        2,
        "--dist-url",
        url,
    ]
    nodes = [
        start_main(*flags, "--rank", 0, "--output-dir", tmp_path / "0"),
        start_main(*flags, "--rank", 1, "--output-dir", tmp_path / "1", "--resume", "checkpoint.pth.tar"),
    ]
    for node in nodes:
        err = node.communicate(timeout=60)[1]
        assert node.returncode == 2 and "rank 0, which reads it, has none: give it to rank 0" in err, err


# --- torchvision's weights --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Any, monkeypatch: Any) -> Iterator[Any]:
    """The folder that is served in place of download.pytorch.org; TORCH_HOME is another one."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return os.path.join(str(folder), os.path.basename(path))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(start, "URL", f"http://127.0.0.1:{httpd.server_port}/models/")
        monkeypatch.setitem(start.FILES, "vgg16", NAME)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home 图"))
        yield folder
        httpd.shutdown()


def test_weights_are_downloaded_once(server: Any) -> None:
    (server / NAME).write_bytes(CONTENT)
    path = start.imagenet_weights("vgg16")
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    (server / NAME).unlink()
    assert start.imagenet_weights("vgg16") == path


def test_without_a_network_the_address_and_the_place_are_named(server: Any, tmp_path: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        start.imagenet_weights("vgg16")
    assert f"cannot download {start.URL}{NAME} (HTTP Error 404" in str(refusal.value)
    assert f"put it at {tmp_path}" in str(refusal.value) and NAME in str(refusal.value)


def test_a_file_with_another_checksum_is_refused(server: Any) -> None:
    (server / NAME).write_bytes(b"something else")
    with pytest.raises(UsageError, match="cannot download"):
        start.imagenet_weights("vgg16")
    (server / NAME).write_bytes(CONTENT)
    path = start.imagenet_weights("vgg16")
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match="checksum does not start with"):
        start.imagenet_weights("vgg16")
