# SPDX-License-Identifier: BSD-3-Clause
"""Runs whose output cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import vgg
from helpers.images import jpeg
from helpers.program import REPOSITORY, SMALL_MAIN, environment

import pytest
import torch

FOLDERS = ["/tmp", "/var/tmp"]

full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full stands in for a full disk")
TRAIN = [
    sys.executable,
    SMALL_MAIN,
    "--device",
    "cpu",
    "--arch",
    "vgg11",
    "-b",
    "64",
    "--stop-step-num",
    "3",
    "-p",
    "1",
]


@full_disk
def test_a_run_whose_log_is_on_a_full_disk_saves_its_checkpoint(tmp_path: Any) -> None:
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [*TRAIN, "--output-dir", str(tmp_path)], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=120
        )
    assert finished.returncode == 0
    assert finished.stderr.decode().splitlines() == [
        "main.py: warning: log output is being lost ([Errno 28] No space left on device)"
    ]
    assert (tmp_path / "checkpoint.pth.tar").exists()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="a pipe that keeps writes apart is Linux's")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("function", ["line", "result", "warning", "error", "notice", "unexpected"])
def test_a_line_is_one_write(function: str, unbuffered: str) -> None:
    """So that the lines of processes that share a stream do not mix, in containers with PYTHONUNBUFFERED=1 too."""
    reader, writer = os.pipe2(os.O_DIRECT)  # a read returns what one write wrote
    code = f"from engine import console\nfor text in ('one', 'two: 图', 'x' * 1000): console.{function}(text)"
    env = environment(PYTHONUNBUFFERED=unbuffered, PYTHONIOENCODING="utf-8", LOCAL_RANK="0")
    subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer, env=env, check=True, timeout=60)
    os.close(writer)
    writes = list(iter(lambda: os.read(reader, 4096).decode(), ""))
    os.close(reader)
    assert len(writes) == 3 and all(text.endswith("\n") for text in writes), writes


@pytest.mark.parametrize("stderr", ["kept", "closed too"])
def test_a_run_whose_reader_is_gone_saves_its_checkpoint(tmp_path: Any, stderr: str) -> None:
    """As `| tee` at Ctrl-C, or a terminal that is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        finished = subprocess.run(
            [*TRAIN, "--output-dir", str(tmp_path)],
            stdout=writer,
            stderr=subprocess.PIPE if stderr == "kept" else writer,
            env=environment(),
            timeout=120,
        )
    finally:
        os.close(writer)
    assert finished.returncode == 0
    assert (tmp_path / "checkpoint.pth.tar").exists()
    if stderr == "kept":
        warning = "main.py: warning: log output is being lost ([Errno 32] Broken pipe)"
        assert finished.stderr.decode().splitlines() == [warning]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "done"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "m.pth")
    torch.save(vgg.VGG("vgg11", 10, (8, 8, 16, 16, 16), 32).state_dict(), path)
    return path


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}
STREAMS: list[tuple[str, dict[str, str]]] = [
    (">&-", {}),
    ("2>&-", {}),
    ("<&- >&- 2>&-", {}),
    ("", {**ASCII, "PYTHONIOENCODING": "ascii:surrogateescape"}),
    ("", {**ASCII, "PYTHONIOENCODING": "ascii:strict"}),
]


@pytest.mark.parametrize("closed, env", STREAMS)
@pytest.mark.parametrize("script", ["main.py", "predict.py", "export.py"])
def test_closed_streams_and_other_encodings_fail_nothing(
    tmp_path: Any, weights: str, script: str, closed: str, env: dict[str, str]
) -> None:
    """As `>&-`, cron or a daemon leave them; names of files are any bytes."""
    if env and not torch.__file__.isascii():
        pytest.skip("torch itself cannot be imported from a folder with such a name in an ASCII locale")
    folder = os.fsencode(str(tmp_path)) + b"/\xff\xc3\xa9"
    os.mkdir(folder)
    for name in (b"a", b"b"):
        with open(folder + b"/" + name + b"\xe2\x82\xac.jpg", "wb") as file:
            file.write(jpeg(40, 40, 0))
    export = ["--checkpoint", weights, "--output", folder + b"/m.safetensors"]
    if script == "export.py":
        pytest.importorskip("safetensors")
    commands: dict[str, list[Any]] = {
        "main.py": [*TRAIN[1:], "--output-dir", folder],
        "predict.py": [os.path.join(REPOSITORY, script), "--device", "cpu", folder, "--checkpoint", weights],
        "export.py": [os.path.join(REPOSITORY, script), *export],
    }
    shell = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, *commands[script]]
    finished = subprocess.run(shell, capture_output=True, env=environment(**env), timeout=120)
    assert (finished.returncode, b"Traceback" in finished.stderr) == (0, False), finished.stderr
    if script == "main.py":
        assert os.path.exists(folder + b"/checkpoint.pth.tar")
    assert bool(finished.stdout) == (closed in ("", "2>&-"))


def can_unshare() -> bool:
    if shutil.which("unshare") is None or not os.path.isdir("/dev/shm"):
        return False
    return subprocess.run(["unshare", "-m", "true"], stderr=subprocess.PIPE).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="making /tmp read-only needs root and unshare")
@pytest.mark.parametrize("flags", [["-j", "0"], ["-j", "1"], ["--multiprocessing-distributed", "--device-list", "0,1"]])
def test_a_run_needs_no_temporary_folder(flags: list[str]) -> None:
    """Neither TMPDIR, /tmp, /var/tmp nor the working folder can be written to, only --output-dir."""
    output = tempfile.mkdtemp(dir="/dev/shm")
    read_only = "".join(f"mount --bind {path} {path} && mount -o remount,ro,bind {path} && " for path in FOLDERS)
    command = ["unshare", "-m", "bash", "-c", f'{read_only} cd /tmp && exec "$@"', "bash", *TRAIN, *flags]
    try:
        finished = subprocess.run(
            [*command, "--output-dir", output], stderr=subprocess.PIPE, env=environment(TMPDIR="/missing"), timeout=120
        )
        assert finished.returncode == 0, finished.stderr
        assert "checkpoint.pth.tar" in os.listdir(output)
    finally:
        shutil.rmtree(output)


def test_without_a_home_no_folder_is_named_like_one(tmp_path: Any) -> None:
    """As with `docker run --user 54321`: no HOME, and no entry in passwd."""
    code = (
        "import os, pwd\n"
        "def missing(_): raise KeyError\n"
        "pwd.getpwuid = missing\n"
        "os.environ.pop('HOME', None)\n"
        "import engine\n"
        "print(os.path.expanduser('~/x'))"
    )
    finished = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment(), timeout=120)
    assert os.path.isabs(finished.stdout.decode().strip())
