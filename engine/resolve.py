# SPDX-License-Identifier: BSD-3-Clause
"""What the flags mean on this machine: device, precision, processes, output folders. Settled before anything starts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile

from engine import device, precision
from engine.errors import UsageError
from engine.launcher import Topology, resolve_topology, under_torchrun


def resolve(args: argparse.Namespace) -> Topology:
    """Add to the flags what depends on this machine: device, precision, processes. Returns the topology."""
    args.device, count = device.resolve_device(args.device)
    one_device = not (args.multiprocessing_distributed or under_torchrun())
    args.device_list = device.resolve_device_list(args.device_list, args.gpu, args.device, count, one_device=one_device)
    args.dist_backend = device.resolve_backend(args.dist_backend, args.device)
    args.precision = precision.resolve_precision(
        args.device, amp=args.amp, opt_level=args.opt_level, amp_dtype=args.amp_dtype
    )
    if args.loss_scale_value is not None and args.precision == "bf16":
        device.notice("--loss-scale-value is ignored: bf16 has the range of fp32 and needs no scale")
    device.check_torch_options(
        args.device,
        deterministic=args.deterministic,
        profile=args.profile,
        compile_model=args.compile,
        grad_compress=args.grad_compress,
    )
    topology = resolve_topology(
        multiprocessing_distributed=args.multiprocessing_distributed,
        world_size=args.world_size,
        rank=args.rank,
        addr=args.addr,
        dist_url=args.dist_url,
        devices=len(args.device_list),
    )
    args.nodes, args.rank, args.processes = topology.nodes, topology.node_rank, topology.processes
    args.dist_url, args.multiprocessing_distributed = topology.dist_url, topology.spawn
    if args.device != "cpu" and args.processes > len(args.device_list):
        devices = len(args.device_list)
        raise UsageError(
            f"torchrun starts {args.processes} processes on {devices} devices: use --nproc-per-node {devices}"
        )
    if args.batch_size % args.processes:
        below = args.batch_size // args.processes * args.processes
        nearest = f"{below} or {below + args.processes}" if below else str(args.processes)
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {args.processes} processes: use {nearest}"
        )
    if args.workers is None:
        args.workers = device.default_workers(args.device, args.processes)
    if args.report and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--report requires matplotlib: pip install matplotlib")
    return topology


def make_output_folder(flag: str, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write there ({error.strerror})") from error
