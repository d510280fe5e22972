# SPDX-License-Identifier: BSD-3-Clause
"""The fault tests themselves, where they can be checked quickly."""

from __future__ import annotations

import os

from helpers.program import REPOSITORY, run


def test_cluster_without_network_namespaces_is_skipped(tmp_path):
    """Each part is skipped by name if `ip` refuses; torch is not needed until then."""
    ip = tmp_path / "ip"
    ip.write_text("#!/bin/sh\necho refused >&2\nexit 1\n")
    ip.chmod(0o755)
    script = os.path.join(REPOSITORY, "test", "faults", "cluster.sh")
    result = run("bash", script, "nodes", env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}, timeout=60)
    assert result.code == 0, result.err
    assert "command not found" not in result.err
    assert result.out.splitlines()[-1].startswith("skipped  nodes: "), result.out
