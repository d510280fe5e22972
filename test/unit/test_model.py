# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's weights, from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from typing import Any, Iterator

from engine.checkpoints import model
from engine.errors import UsageError

import pytest

CONTENT = b"weights" * 1000
NAME = f"vgg16-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


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
        monkeypatch.setattr(model, "URL", f"http://127.0.0.1:{httpd.server_port}/models/")
        monkeypatch.setitem(model.FILES, "vgg16", NAME)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home 图"))
        yield folder
        httpd.shutdown()


def test_weights_are_downloaded_once(server: Any) -> None:
    (server / NAME).write_bytes(CONTENT)
    path = model.imagenet_weights("vgg16")
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    (server / NAME).unlink()
    assert model.imagenet_weights("vgg16") == path


def test_without_a_network_the_address_and_the_place_are_named(server: Any, tmp_path: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        model.imagenet_weights("vgg16")
    assert f"cannot download {model.URL}{NAME} (HTTP Error 404" in str(refusal.value)
    assert f"put it at {tmp_path}" in str(refusal.value) and NAME in str(refusal.value)


def test_a_file_with_another_checksum_is_refused(server: Any) -> None:
    (server / NAME).write_bytes(b"something else")
    with pytest.raises(UsageError, match="cannot download"):
        model.imagenet_weights("vgg16")
    (server / NAME).write_bytes(CONTENT)
    path = model.imagenet_weights("vgg16")
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match="checksum does not start with"):
        model.imagenet_weights("vgg16")
