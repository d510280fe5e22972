# SPDX-License-Identifier: BSD-3-Clause
"""The processes of a job: how they meet, agree, exchange values, and fail together."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
from typing import Any, Callable, Iterator, Sequence

from engine.errors import DivergedError, RendezvousError, UsageError, first_line
from engine.parallel.heartbeat import Heartbeat
from engine.parallel.rendezvous import JobStore, Member, rendezvous
from engine.versions import TORCH

import torch
import torch.distributed as dist
from torch import nn

OUT_OF_MEMORY = getattr(torch.cuda, "OutOfMemoryError", ())  # a RuntimeError of its own since torch 1.13


class Communicator:
    """This process among the others of its job; all methods except fail and before_exit are
    collective: every process must call them.

    RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE come from the launcher (ours, torchrun, Slurm). Control goes over
    gloo, whatever backend the gradients use, so that a decision never waits for a device.

    Args:
        backend: of the gradients: hccl, nccl or gloo.
        url: where the processes meet.
        timeout: seconds to wait for the others.
        report: called with one line if another rank is unreachable.

    Raises:
        RendezvousError: if the others cannot be reached in time.
    """

    def __init__(self, backend: str, url: str, timeout: float, report: Callable[[str], None]) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.control: Any = None  # the gloo group
        self.heartbeat: Heartbeat | None = None
        if self.world_size > 1:
            member = Member(self.rank, self.world_size, self.local_rank, self.local_world_size, timeout)
            self._connect(backend, rendezvous(url, member), report)

    def _connect(self, backend: str, met: JobStore, report: Callable[[str], None]) -> None:
        """Create torch's groups. A rank that dies now is found by the heartbeat; torch would wait for half an hour."""
        try:
            self.heartbeat = Heartbeat(*met.master, self.rank, self.world_size, met.job, report)
            # The processes of a node may wait for hours while one of them checks a million images.
            patience = datetime.timedelta(days=1)
            options: dict[str, Any] = {"timeout": patience} if backend == "gloo" else {}
            dist.init_process_group(backend, store=met.store, rank=self.rank, world_size=self.world_size, **options)
            gloo = backend == "gloo"
            self.control = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=patience)
            self.barrier()
        except (RuntimeError, ValueError, OSError) as error:
            raise RendezvousError(
                f"rank {self.rank} of {self.world_size} cannot connect to the others ({first_line(error)}); check that "
                "the nodes reach each other"
            ) from error

    # --- collectives ---

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1), group=self.control)

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
        if self.world_size == 1:
            return bool(flag)
        count = torch.tensor([int(bool(flag))])
        dist.all_reduce(count, group=self.control)
        return bool(count.item())

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

    def broadcast(self, state: Any) -> Any:
        """Return rank 0's nested dicts, lists and CPU tensors on every process; tensors arrive as float32 or int64."""
        if self.world_size == 1:
            return state
        pickler = _TensorPickler()
        if self.rank == 0:
            pickler.dump(state)
        layouts = [(tensor.dtype, tensor.shape) for tensor in pickler.tensors]
        plain, layouts = self._broadcast_plain((pickler.file.getvalue(), layouts))
        if self.rank == 0:
            tensors = [tensor.contiguous() for tensor in pickler.tensors]
        else:
            tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in layouts]
        for tensor in tensors:
            dist.broadcast(tensor, 0, group=self.control)
        return _TensorUnpickler(plain, tensors).load()

    def _broadcast_plain(self, value: Any) -> Any:
        content = pickle.dumps(value)  # between our own processes: nothing foreign is read
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self.control)
        buffer = torch.tensor(list(content) if self.rank == 0 else [0] * int(size.item()), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self.control)
        return pickle.loads(bytes(buffer.tolist()))

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process rank 0's buffers: the running statistics of batch norm."""
        if self.world_size > 1:
            for buffer in model.buffers():
                value = buffer.detach().cpu()
                dist.broadcast(value, 0, group=self.control)
                buffer.copy_(value)

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
        if self.world_size > 1:
            self.barrier()
            if self.heartbeat is not None:
                self.heartbeat.stop()


class StopVote:
    """The agreement to stop. No step waits for it: every process reads a step's result one step later.

    It takes a vote per step, because the processes receive a signal at different moments.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self.pending: tuple[Any, torch.Tensor] | None = None  # the all-reduce in flight, and its result

    def vote(self, stop: Any) -> bool:
        """Vote in this step; return whether any process voted to stop in the step before."""
        if self.group.world_size == 1:
            return bool(stop)
        stopping = self.result()
        votes = torch.tensor([int(bool(stop))])
        self.pending = dist.all_reduce(votes, group=self.group.control, async_op=True), votes
        return stopping

    def result(self) -> bool:
        """Return whether any process voted to stop in the vote whose result was not read yet."""
        if self.pending is None:
            return False
        (work, votes), self.pending = self.pending, None
        work.wait()
        return bool(votes.item())


class _TensorPickler(pickle.Pickler):
    """Pickles all but the tensors, which it collects."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.tensors: list[torch.Tensor] = []
        super().__init__(self.file)

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, torch.Tensor):
            # gloo of older torch sends neither bool nor bfloat16.
            self.tensors.append(value.float() if value.is_floating_point() else value.long())
            return len(self.tensors) - 1
        return None


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors = tensors

    def persistent_load(self, position: int) -> torch.Tensor:
        return self.tensors[position]


# --- what all processes must agree on ---------------------------------------------------------------------------------


def check_same_flags(group: Communicator, flags: dict[str, Any]) -> None:
    """Raise UsageError on every process if one of them was started differently from rank 0. flags: {name: value}."""
    expected = group.broadcast(flags)
    different = [
        f"{name} is {flags.get(name)} here and {expected.get(name)} on rank 0"
        for name in sorted({**flags, **expected})
        if flags.get(name) != expected.get(name)
    ]
    if group.any(different):
        details = ", ".join(different) or "the flags of another node differ from rank 0's"
        raise UsageError(f"the nodes were started differently: {details}")


def check_same_parameters(group: Communicator, model: nn.Module) -> None:
    """Raise DivergedError on every process if the parameters of one differ from rank 0's by a single bit."""
    own = parameter_checksum(model)
    different = own != group.broadcast(own)
    if group.any(different):
        who = f" (rank {group.rank} is one)" if different else ""
        raise DivergedError(
            f"the parameters of the processes have drifted apart{who}: faulty hardware, or libraries that compute "
            "differently; continue from the last checkpoint"
        )


def parameter_checksum(model: nn.Module) -> float:
    """Return a number that tells two sets of parameters apart by a single bit (before torch 1.7: nearly always).

    One synchronization.
    """
    total: Any = 0
    for position, parameter in enumerate(model.parameters()):
        if TORCH >= (1, 7):
            bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
            total = total + bits.sum(dtype=torch.int64) * (2 * position + 1)
        else:  # tensors cannot be viewed as their bits
            total = total + parameter.detach().double().sum() * (2 * position + 1)
    return total.item()
