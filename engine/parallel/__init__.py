# SPDX-License-Identifier: BSD-3-Clause
"""The processes of a job: how they start, meet, agree, exchange values, and fail together."""

from engine.parallel.communicator import Communicator
from engine.parallel.launcher import launch
from engine.parallel.topology import Ranks, Topology, free_port, resolve_topology, under_torchrun

__all__ = ["Communicator", "Ranks", "Topology", "free_port", "launch", "resolve_topology", "under_torchrun"]
