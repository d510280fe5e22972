# SPDX-License-Identifier: BSD-3-Clause
"""tools/download_cifar.py against a server of this machine that cuts, refuses and lies."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine.data import open_datasets
from engine.data.cifar import CIFAR10, CIFAR100

from helpers.images import write_cifar
from helpers.program import REPOSITORY, run
from tools.download_cifar import ARCHIVES

import pytest

pytestmark = pytest.mark.once

TOOL = os.path.join(REPOSITORY, "tools", "download_cifar.py")
FETCH = """
import sys
sys.path.insert(0, {tools!r})
import download_cifar as tool
from engine import console
archive = tool.ARCHIVES[sys.argv[1]]._replace(md5=sys.argv[4])
console.run_script(lambda: print(tool.fetch(archive, sys.argv[2], sys.argv[3] + archive.name)) or 0)
"""


class Server:
    """Serves one archive. cut: bytes after which a connection ends. ranges: whether a part of it can be had."""

    def __init__(self, content):
        self.content, self.cut, self.ranges, self.sent, self.status = content, None, True, [], 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(wanted.group(1)) if wanted and outer.ranges else 0
                if outer.status != 200 or start >= len(outer.content):
                    self.send_error(outer.status if outer.status != 200 else 416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                part = outer.content[start:][: outer.cut]
                outer.sent.append((start, len(part)))
                self.wfile.write(part)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, request):
    classes = getattr(request, "param", 10)
    name = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    write_cifar(tmp_path / "made" / name, binary=False, classes=classes)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(str(tmp_path / "made" / name), name)
        outside = tarfile.TarInfo("../outside")
        archive.addfile(outside, io.BytesIO())
    server = Server(buffer.getvalue())
    yield server
    server.server.shutdown()


def fetch(server, folder, classes="10"):
    md5 = hashlib.md5(server.content).hexdigest()
    code = FETCH.format(tools=os.path.dirname(TOOL))
    return run(sys.executable, "-c", code, classes, folder, server.url, md5)


@pytest.mark.parametrize("server, classes", [(10, "10"), (100, "100")], indirect=["server"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_continues_and_the_dataset_opens(server, tmp_path, classes, ranges):
    server.ranges, server.cut, folder = ranges, len(server.content) // 3, tmp_path / "数 据"
    results = [fetch(server, folder, classes) for _ in range(2)]
    assert [result.code for result in results] == [1, 1]
    assert all("run the same command again" in result.err and len(result.err.splitlines()) == 1 for result in results)
    assert not any(path.is_dir() for path in folder.iterdir())
    server.cut = None
    result = fetch(server, folder, classes)
    assert result.code == 0, result.err
    assert [start for start, _ in server.sent] == ([0, server.sent[0][1], 2 * server.sent[0][1]] if ranges else [0] * 3)
    training, validation = open_datasets(str(folder), evaluate=False, skip_unreadable=False)
    assert (len(training), len(validation)) == (200, 40) if classes == "10" else (40, 40)
    assert [path.name for path in folder.iterdir()] == [os.path.basename(result.out.strip())]
    assert not (folder.parent / "outside").exists() and not (folder / "outside").exists()
    requests = len(server.sent)
    assert fetch(server, folder, classes).code == 0 and len(server.sent) == requests  # it is there


def test_a_whole_part_whose_rename_was_lost_is_taken(server, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.content)
    assert fetch(server, tmp_path).code == 0 and server.sent == []


@pytest.mark.parametrize("classes, cifar", [("10", CIFAR10), ("100", CIFAR100)])
def test_the_files_that_are_looked_for_are_those_that_training_reads(classes, cifar):
    archive = ARCHIVES[classes]
    assert set(archive.files) - {"meta"} == {*cifar.train, cifar.test} and archive.folder in cifar.folders


@pytest.mark.parametrize("server, classes", [(10, "10"), (100, "100")], indirect=["server"])
def test_an_archive_of_the_user_is_unpacked_and_kept(server, tmp_path, classes):
    path = tmp_path / ("cifar-10-python.tar.gz" if classes == "10" else "cifar-100-python.tar.gz")
    path.write_bytes(server.content[:-1])
    refused = fetch(server, tmp_path, classes)
    assert refused.code == 2 and f"{path}: its MD5 is not" in refused.err and len(refused.err.splitlines()) == 1
    assert path.read_bytes() == server.content[:-1]
    path.write_bytes(server.content)
    result = fetch(server, tmp_path, classes)
    assert result.code == 0 and os.path.isdir(result.out.strip()), result.err
    assert path.read_bytes() == server.content and server.sent == []


@pytest.mark.parametrize("server, classes", [(10, "10"), (100, "100")], indirect=["server"])
@pytest.mark.parametrize("lacking", ["test", "train", "all", "a file"])
def test_a_folder_that_is_not_whole_is_not_taken_for_the_dataset(server, tmp_path, classes, lacking):
    target = fetch(server, tmp_path, classes).out.strip()
    names = {"test": ["test_batch", "test"], "train": ["data_batch_3", "train"]}.get(lacking, os.listdir(target))
    for name in names:
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))
    if lacking == "a file":
        os.rmdir(target)
        with open(target, "w"):
            pass
    result = fetch(server, tmp_path, classes)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and f"{target}: there is no " in result.err


def test_another_file_is_refused_and_removed(server, tmp_path):
    """Through the command line, with the published checksum."""
    result = run(sys.executable, TOOL, "10", tmp_path / "d", "--url", server.url)
    assert result.code == 1 and "c58f30108f718f92721af3b95e74349a" in result.err and len(result.err.splitlines()) == 1
    assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_server_that_refuses_is_one_line(server, tmp_path, status):
    server.status = status
    result = run(sys.executable, TOOL, "100", tmp_path / "d", "--url", server.url)
    assert result.code == 1 and str(status) in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("url", ["mirror.example/cifar", "/data", "htp://x/", "http://[x/", "http://mirror/\u56fe x"])
def test_an_address_that_is_none_is_one_line(tmp_path, url):
    result = run(sys.executable, TOOL, "10", tmp_path / "d", "--url", url)
    assert result.code == 1 and len(result.err.splitlines()) == 1 and url[:5] in result.err, result.err
    assert list((tmp_path / "d").iterdir()) == []


def test_no_server_and_a_folder_that_cannot_be_made_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    url = "http://127.0.0.1:1/"
    for folder, named, code in (
        (tmp_path / "d", url, 1),
        (tmp_path / "file", tmp_path / "file", 2),
        (tmp_path / "file" / "d", tmp_path, 1),
    ):
        result = run(sys.executable, TOOL, "10", folder, "--url", url)
        assert result.code == code and len(result.err.splitlines()) == 1, result.err
        assert f"error: {named}" in result.err
