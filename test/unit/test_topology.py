# SPDX-License-Identifier: BSD-3-Clause
"""Who runs where, from the flags or the environment."""

from __future__ import annotations

from engine.errors import UsageError
from engine.parallel import Ranks, resolve_topology

import pytest


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def topology(**changes):
    options = {
        "multiprocessing_distributed": False,
        "world_size": -1,
        "rank": -1,
        "addr": "127.0.0.1",
        "dist_url": None,
        "devices": 4,
    }
    return resolve_topology(**{**options, **changes})


def test_flags_describe_nodes_and_processes():
    alone = topology()
    assert (alone.nodes, alone.node_rank, alone.processes, alone.spawn) == (1, 0, 1, False)
    nodes = topology(multiprocessing_distributed=True, world_size=3, rank=2, addr="10.0.0.1")
    assert (nodes.nodes, nodes.node_rank, nodes.processes, nodes.spawn) == (3, 2, 4, True)
    assert nodes.dist_url == "tcp://10.0.0.1:59629"
    # The reference's scripts pass a loopback URL and the real address beside it.
    assert topology(addr="10.0.0.1", dist_url="tcp://127.0.0.1:50000", world_size=2, rank=0).dist_url == (
        "tcp://10.0.0.1:50000"
    )
    assert topology(dist_url="tcp://[::1]:50000").dist_url == "tcp://[::1]:50000"
    with pytest.raises(UsageError, match="--rank 2 does not fit --world-size 2"):
        topology(world_size=2, rank=2)


def test_torchruns_variables_describe_nodes_and_processes(monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    job = topology(multiprocessing_distributed=True)
    assert (job.nodes, job.node_rank, job.processes, job.dist_url, job.spawn) == (3, 2, 2, "env://", False)


@pytest.mark.parametrize("name, value", [("RANK", None), ("RANK", "x"), ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_RANK", "")])
def test_a_variable_of_torchrun_that_is_wrong_is_named(monkeypatch, name, value):
    variables = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", name: value}
    for variable, text in variables.items():
        monkeypatch.delenv(variable, raising=False)
        if text is not None:
            monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"the variable {name} must be at least"):
        topology()


@pytest.mark.parametrize("local", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("world", [1, 2, 5, 6, 7, 16])
def test_each_node_must_have_as_many_processes(monkeypatch, world, local):
    """Otherwise an epoch would have the wrong number of steps."""
    for name, value in {"LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    if world % local == 0:
        assert topology().nodes * local == world
        return
    with pytest.raises(UsageError, match=f"^WORLD_SIZE {world} is not divisible by LOCAL_WORLD_SIZE {local}: start as"):
        topology()


def test_a_process_gets_its_place_from_the_flags_or_from_torchrun(monkeypatch):
    assert topology().ranks() == Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert topology(world_size=3, rank=2).ranks() == Ranks(2, 3, 0, 1)
    nodes = topology(multiprocessing_distributed=True, world_size=3, rank=2)
    assert [nodes.ranks(local_rank) for local_rank in (0, 3)] == [Ranks(8, 12, 0, 4), Ranks(11, 12, 3, 4)]
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    assert topology().ranks() == Ranks(5, 6, 1, 2)


def test_env_url_takes_the_variables_of_a_kubernetes_operator(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    job = topology(dist_url="env://")
    assert (job.dist_url, job.spawn, job.ranks()) == ("env://", False, Ranks(2, 3, 0, 1))
    nodes = topology(dist_url="env://", multiprocessing_distributed=True)  # they count nodes then, as the flags do
    assert nodes.ranks(1) == Ranks(9, 12, 1, 4)
    assert topology(dist_url="env://", world_size=2, rank=1).ranks() == Ranks(1, 2, 0, 1)  # what is given counts
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match="the variable RANK must be at least 0"):
        topology(dist_url="env://")


def test_variables_that_are_ignored_are_one_warning(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert topology().ranks() == Ranks(0, 1, 0, 1)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "warning: WORLD_SIZE=3 and RANK=2 are ignored" in err, err
    assert "--dist-url env://" in err
    topology(world_size=2, rank=0)  # the flags say what they want
    monkeypatch.setenv("WORLD_SIZE", "1")
    topology()
    assert capsys.readouterr().err == ""
