# SPDX-License-Identifier: BSD-3-Clause
"""How training runs on one device: what differs between npu, gpu, mps, cpu and torch versions.

Precision is in amp.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import math
import os
import sys
from typing import Any, Callable, Iterator, cast

from engine import console
from engine.device.choice import TORCH_DEVICES, cpu_info, default_threads, load_runtime, total_memory
from engine.errors import DeviceUnavailableError, first_line
from engine.versions import TORCH

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader


class ComputeDevice:
    """The device of this process.

    Args:
        type: npu, gpu, mps or cpu.
        index: the device's number.
        local_world_size: number of processes that share this node's cores.
        deterministic: choose kernels that are bitwise repeatable.

    Attributes:
        device: the same as a torch.device.
        memory_format: of images and weights; convolutions prefer channels_last.
        log_interval: seconds from one reading of the metrics to the next; on a CPU a reading costs nothing.
    """

    def __init__(self, type: str, index: int = 0, *, local_world_size: int = 1, deterministic: bool = False) -> None:
        self.type, self.index, self.deterministic = type, index, deterministic
        name = TORCH_DEVICES[type]
        self.device = torch.device(name) if type in ("cpu", "mps") else torch.device(name, index)
        self.runtime = cast("Any", getattr(torch, name, None))  # torch.cuda, torch.npu, …
        self.log_interval = 0.0 if type == "cpu" else 1.0
        # NPUs do not support channels_last, torch before 1.7 does only partly, and on MPS its backward pass is wrong
        # (pytorch/pytorch#175189, #175190).
        contiguous = type in ("npu", "mps") or TORCH < (1, 7)
        self.memory_format = torch.contiguous_format if contiguous else torch.channels_last
        if type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(default_threads(local_world_size))
        if type in ("gpu", "npu"):
            self.runtime.set_device(self.device)
        self._copy_stream = self.runtime.Stream(self.device) if type == "gpu" else None
        if type == "npu" and hasattr(self.runtime, "set_compile_mode"):
            self.runtime.set_compile_mode(jit_compile=False)  # prebuilt kernels; none is compiled at run time
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace
            torch.use_deterministic_algorithms(True)

    @staticmethod
    def load_runtime(type: str) -> None:
        """Add an NPU and its hccl to torch in a process that was spawned: only the one that read the flags has them."""
        load_runtime(type)

    # --- the model and what steps it ---

    def place(self, model: nn.Module, *, one_shape: bool = False) -> None:
        """Move a model to the device.

        one_shape: all its images have one size, so cuDNN may search for the best kernel.
        """
        if self.type == "gpu":
            torch.backends.cudnn.benchmark = one_shape and not self.deterministic
        model.to(self.device)
        if self.memory_format != torch.contiguous_format:
            model.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def sgd_options(self) -> dict[str, Any]:
        """Return keyword arguments of torch.optim.SGD: a fused kernel, if torch has one for this device.

        Never the _foreach operators on an NPU, where one of them has failed on tensors in the chip's own layout.
        """
        if self.type == "npu" and TORCH >= (2, 0):
            return {"foreach": False}
        return {"fused": True} if self.type in ("gpu", "cpu") and TORCH >= (2, 4) else {}

    def prepare_sgd(self, sgd: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return Ascend's fused SGD in place of torch's on an NPU; elsewhere the same, its momentum set to 0.

        torch's fused kernel leaves the momentum uninitialized if the very first step is skipped.
        """
        groups = sgd.param_groups
        if self.type == "npu" and groups[0]["params"][0].dtype != torch.bfloat16:  # O3; the fused one takes fp32, fp16
            fused = _npu_fused_sgd()
            if fused is not None:
                names = ("params", "lr", "lr_factor", "momentum", "weight_decay")
                return fused(
                    [{name: group[name] for name in names if name in group} for group in groups], lr=groups[0]["lr"]
                )
            console.line("=> neither torch_npu nor apex has NpuFusedSGD: using torch's SGD, which is slower")
        for group in groups:
            for parameter in group["params"] if group["momentum"] else []:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd

    def ddp_options(self) -> dict[str, Any]:
        """Return keyword arguments of DistributedDataParallel.

        It sends no buffers: Communicator.broadcast_buffers does. static_graph is left out: it fails in a first step
        under no_sync, and gains nothing if every parameter gets a gradient (bench/RESULTS.md).
        """
        names = inspect.signature(DistributedDataParallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False}
        if TORCH >= (1, 8) and self.type != "npu":  # the fused NPU optimizer keeps gradients in a buffer of its own
            options["gradient_as_bucket_view"] = True
        if self.type in ("gpu", "npu"):
            options["device_ids"] = [self.device.index]
        return options

    def compile(self, model: nn.Module) -> nn.Module:
        """Compile forward and backward at the first step. Call it on the model that DDP has wrapped.

        Dynamo then splits the graph between DDP's buckets, which are sent while the rest of the backward pass runs.
        """
        try:
            return cast("nn.Module", torch.compile(model, dynamic=False))  # all training batches have one size
        except RuntimeError as error:  # Windows, or a Python newer than this torch knows
            raise DeviceUnavailableError(f"--compile: {first_line(error)}; leave it out") from error

    # --- the step ---

    def loader_options(self) -> dict[str, Any]:
        """Return keyword arguments of DataLoader: pinned memory, from which a batch is copied beside the step."""
        options: dict[str, Any] = {"pin_memory": self.type in ("gpu", "npu")}
        # torch 2.9 and later pin for the accelerator that is there, and warn of the parameter.
        named = "pin_memory_device" in inspect.signature(DataLoader.__init__).parameters and TORCH < (2, 9)
        if self.type == "npu" and named:
            options["pin_memory_device"] = "npu"
        return options

    def memory(self) -> float:
        """Return the bytes of memory that the processes of this node share if they run on its CPU, else infinity."""
        return total_memory() if self.type == "cpu" else math.inf

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of a batch to the device. On a GPU this overlaps with the steps still being computed."""
        if self._copy_stream is None:
            return tensor.to(self.device, non_blocking=self.type == "npu")
        with self.runtime.stream(self._copy_stream):
            tensor = tensor.to(self.device, non_blocking=True)
        compute_stream = self.runtime.current_stream()
        compute_stream.wait_stream(self._copy_stream)
        tensor.record_stream(compute_stream)  # the copy stream must not reuse this memory before the step has ended
        return tensor

    def normalizer(
        self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from (N, S, S, 3) uint8 images on the host to (N, 3, S, S) normalized ones on the device.

        Images travel as bytes, a quarter of the traffic of fp32. mean, std: of each channel, for pixels in [0, 1].
        """
        means = torch.tensor(mean, device=self.device).view(1, 3, 1, 1) * 255
        scale = 1 / (torch.tensor(std, device=self.device).view(1, 3, 1, 1) * 255)

        def normalize(images: torch.Tensor) -> torch.Tensor:
            images = self.to_device(images).permute(0, 3, 1, 2)
            return images.to(torch.float32, memory_format=self.memory_format).sub_(means).mul_(scale).to(dtype)

        return normalize

    def seed(self, seed: int) -> None:
        """Seed torch's generators, including this device's."""
        torch.manual_seed(seed)
        if self.type == "npu":
            self.runtime.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.type != "cpu":
            self.runtime.synchronize()

    # --- records ---

    @contextlib.contextmanager
    def trace(self, path: str | None) -> Iterator[Any]:
        """Profile ten steps after five of warm-up into `path`, a Chrome trace (Perfetto, chrome://tracing).

        Yields a profiler; call its `step()` after each step. Does nothing and yields None without a path.
        """
        if path is None:
            yield None
            return
        library = getattr(sys.modules.get("torch_npu"), "profiler", None) or torch.profiler
        schedule = library.schedule(wait=4, warmup=1, active=10, repeat=1)
        written = []

        def write(profiler: Any) -> None:
            profiler.export_chrome_trace(path)
            written.append(path)
            console.line(f"=> trace written to {path}")

        with library.profile(schedule=schedule, on_trace_ready=write) as profiler:
            yield profiler
        if not written:
            console.line("=> no trace written: the run ended within the five warm-up steps")

    def name(self) -> str:
        """Return the name of the chip, for the records."""
        if self.type in ("gpu", "npu") and hasattr(self.runtime, "get_device_name"):
            return self.runtime.get_device_name(self.device)
        model = cpu_info(r"model name\s*:\s*(.*\S)\s*") if self.type == "cpu" else None
        return model[1] if model else self.type


def _npu_fused_sgd() -> Any:
    """Return NpuFusedSGD: torch_npu's, or that of Ascend's apex; None if there is neither."""
    for module in ("torch_npu.optim", "apex.optimizers"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(module).NpuFusedSGD
    return None


def keep_freed_memory() -> None:
    """Keep glibc from returning freed memory to the kernel. Call it before the first large tensor.

    Otherwise every large tensor of a CPU step is mapped and unmapped again: 1.5 million page faults per step of VGG16.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_arena_max, 1)
