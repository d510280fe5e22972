# SPDX-License-Identifier: BSD-3-Clause
"""The processes of a job: how they meet, agree, exchange values, and fail together."""

from __future__ import annotations

import contextlib
import datetime
import io
import pickle
from typing import Any, Callable, Iterator, Sequence

from engine.errors import DivergedError, RendezvousError, UsageError, first_line
from engine.parallel.heartbeat import Heartbeat
from engine.parallel.rendezvous import meet
from engine.parallel.topology import Ranks

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

OUT_OF_MEMORY = getattr(torch.cuda, "OutOfMemoryError", ())  # a RuntimeError of its own since torch 1.13


class Communicator:
    """This process in its job. All methods but fail and before_exit are collective: every process must call them.

    Control goes over gloo, whatever backend (hccl, nccl or gloo) the gradients use: no decision waits for a device.
    url, timeout: where and how many seconds the processes wait for each other, else RendezvousError.
    report(text, rank): called with one line if a rank is unreachable.
    """

    def __init__(self, ranks: Ranks, backend: str, url: str, timeout: float, report: Callable[..., None]) -> None:
        self.rank, self.world_size, self.local_rank, self.local_world_size = ranks
        self.control: Any = None  # the gloo group
        self.heartbeat: Heartbeat | None = None
        if self.world_size > 1:
            self._connect(backend, *meet(url, ranks, timeout), report)

    def _connect(self, backend: str, store: Any, second: Any, report: Callable[..., None]) -> None:
        """Create torch's groups. A rank that dies now is found by the heartbeat; torch would wait for half an hour."""
        try:
            self.heartbeat = Heartbeat(second, self.rank, self.world_size, report)
            # The processes of a node may wait for hours while one of them checks a million images.
            gloo: dict[str, Any] = {"backend": "gloo", "timeout": datetime.timedelta(days=1)}
            options = gloo if backend == "gloo" else {"backend": backend}
            dist.init_process_group(store=store, rank=self.rank, world_size=self.world_size, **options)
            self.control = dist.group.WORLD if backend == "gloo" else dist.new_group(**gloo)
            self.barrier()
        except (RuntimeError, ValueError, OSError) as error:
            raise RendezvousError(
                f"rank {self.rank} of {self.world_size} cannot connect to the others ({first_line(error)}); check that "
                "the nodes reach each other"
            ) from error

    # --- collectives ---

    def barrier(self) -> None:
        self.sum([0])

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """A context that the local main process runs through before the other processes of its node enter it."""
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()

    def any(self, flag: Any) -> bool:
        """Return whether the flag is true on any process; the same on all."""
        return self.sum([bool(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all processes, in float64: integers are exact up to 2^53."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max_(self, array: Any) -> None:
        """Replace each element of a NumPy array by its maximum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(torch.from_numpy(array), op=dist.ReduceOp.MAX, group=self.control)

    def min(self, value: float) -> float:
        """Return the smallest value of all processes."""
        values = np.array([-value])
        self.max_(values)
        return -values.item()

    def broadcast(self, state: Any) -> Any:
        """Return rank 0's nested dicts, lists and CPU tensors on every process; others get float32 or int64 tensors.

        All but the tensors goes ahead as a pickle from our own rank 0, with the type and the shape of each tensor.
        """
        if self.world_size == 1:
            return state
        file, tensors = io.BytesIO(), []

        class Pickler(pickle.Pickler):  # Python 3.13.0 takes its methods from subclasses alone
            def persistent_id(self, value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return None
                # gloo of older torch sends neither bool nor bfloat16.
                tensors.append((value.float() if value.is_floating_point() else value.long()).contiguous())
                return tensors[-1].dtype, tuple(value.shape)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, layout: Any) -> torch.Tensor:
                tensors.append(torch.empty(layout[1], dtype=layout[0]))
                return tensors[-1]

        if self.rank == 0:
            Pickler(file).dump(state)
        size = torch.tensor([file.tell()])
        dist.broadcast(size, 0, group=self.control)
        content = torch.tensor(list(file.getvalue()) or [0] * int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.control)
        if self.rank != 0:
            state = Unpickler(io.BytesIO(bytes(content.tolist()))).load()
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=self.control)
        return state

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process rank 0's buffers: the running statistics of batch norm."""
        if self.world_size > 1:
            for buffer in model.buffers():
                value = buffer.detach().cpu()
                value = value.float() if value.is_floating_point() else value  # gloo of torch 2.1 sends no bfloat16
                dist.broadcast(value, 0, group=self.control)
                buffer.copy_(value)

    # --- what all processes must agree on ---

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise UsageError on every process if one of them was started differently from rank 0. values: by name."""
        expected = self.broadcast(values)
        different = [
            f"{name} is {values.get(name)} here and {expected.get(name)} on rank 0"
            for name in sorted({**values, **expected})
            if values.get(name) != expected.get(name)
        ]
        if self.any(different):
            details = ", ".join(different) or "the flags of another node differ from rank 0's"
            raise UsageError(f"the nodes were started differently: {details}")

    def check_same_parameters(self, model: nn.Module) -> None:
        """Raise DivergedError on every process if the parameters of one differ from rank 0's by a single bit."""
        own = parameter_checksum(model)
        different = own != self.broadcast(own)
        if self.any(different):
            who = f" (rank {self.rank} is one)" if different else ""
            raise DivergedError(
                f"the parameters of the processes have drifted apart{who}: faulty hardware, or libraries that compute "
                "differently; continue from the last checkpoint"
            )

    def stop_vote(self) -> StopVote:
        """Return a new agreement to stop, for one loop."""
        return StopVote(self)

    # --- the end ---

    def before_exit(self, callback: Callable[[], None]) -> None:
        """Have a function called before this process exits because another is unreachable. Not collective."""
        if self.heartbeat is not None:
            self.heartbeat.before_exit = callback

    def fail(self, error: Exception) -> None:
        """Tell the other processes that this one has failed. Ends the process if a lost peer is the reason.

        torch raises a lost connection as a RuntimeError like any other, so the heartbeat decides, not the message.
        """
        if self.heartbeat is not None:
            if isinstance(error, RuntimeError) and not isinstance(error, OUT_OF_MEMORY):
                self.heartbeat.await_verdict()
            self.heartbeat.announce_failure()

    def close(self) -> None:
        """Wait for all processes at the end. Only after success.

        torch's groups stay: destroying one whose peers have exited can hang (seen with torch 1.5).
        """
        if self.heartbeat is not None:
            self.barrier()
            self.heartbeat.stop()


class StopVote:
    """The agreement to stop. No step waits for it: every process reads a step's result one step later.

    It takes a vote per step, because the processes receive a signal at different moments.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.pending: tuple[Any, torch.Tensor] | None = None  # the all-reduce in flight, and its result

    def vote(self, stop: Any) -> bool:
        """Vote in this step; return whether any process voted to stop in the step before."""
        if self.comm.world_size == 1:
            return bool(stop)
        stopping = self.result()
        votes = torch.tensor([int(bool(stop))])
        self.pending = dist.all_reduce(votes, group=self.comm.control, async_op=True), votes
        return stopping

    def result(self) -> bool:
        """Return whether any process voted to stop in the vote whose result was not read yet."""
        if self.pending is None:
            return False
        (work, votes), self.pending = self.pending, None
        work.wait()
        return bool(votes.item())


def parameter_checksum(model: nn.Module) -> float:
    """Return a number that tells two sets of parameters apart by a single bit (before torch 1.7 nearly always).

    One synchronization.
    """
    total: Any = 0
    for position, parameter in enumerate(model.parameters()):
        try:
            bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
            value = bits.sum(dtype=torch.int64)
        except TypeError:  # torch before 1.7: tensors cannot be viewed as their bits
            value = parameter.detach().double().sum()
        total = total + value * (2 * position + 1)
    return total.item()
