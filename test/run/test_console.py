# SPDX-License-Identifier: BSD-3-Clause
"""Runs whose output cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from helpers.program import SMALL_MAIN, environment

import pytest

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
