# SPDX-License-Identifier: BSD-3-Clause
"""A checkpoint that only another node has."""

from __future__ import annotations

from typing import Any

from engine.parallel import free_port

from helpers.program import start_main


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
