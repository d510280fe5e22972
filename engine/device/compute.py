# SPDX-License-Identifier: BSD-3-Clause
"""How training runs on one device: everything that differs between npu, gpu, mps, cpu and torch versions."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import sys
from typing import Any, Callable, ContextManager, Iterator, cast

from engine.device.choice import TORCH_DEVICES, available_cores, load_apex, needs_apex
from engine.device.step import MixedPrecisionOptimizer
from engine.errors import DeviceUnavailableError, first_line
from engine.versions import TORCH

import torch
from torch import nn

DEFAULT_LOSS_SCALE = 1024.0  # of fp16


class ComputeDevice:
    """The device of this process.

    Args:
        device: npu, gpu, mps or cpu.
        index: the device's number.
        precision: fp32, fp16 or bf16.
        opt_level: O1 computes in half precision by autocast, O2 and O3 hold the weights in it; O2 keeps master weights.
        local_world_size: number of processes that share this node's cores.
        deterministic: choose kernels that are bitwise repeatable.
    """

    def __init__(
        self,
        device: str,
        index: int = 0,
        *,
        precision: str = "fp32",
        opt_level: str = "O1",
        local_world_size: int = 1,
        deterministic: bool = False,
    ) -> None:
        self.type = device
        self.precision = precision
        self.opt_level = opt_level
        self.deterministic = deterministic
        self.half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self.half_weights = self.half is not None and opt_level in ("O2", "O3")
        self.master_weights = self.half is not None and opt_level == "O2"
        torch_device = TORCH_DEVICES[device]
        self.device = torch.device(torch_device) if device in ("cpu", "mps") else torch.device(torch_device, index)
        self._runtime = cast("Any", getattr(torch, torch_device, None))  # torch.cuda, torch.npu, …
        self.apex = load_apex() if self.half is not None and needs_apex(device) else None
        # Convolutions prefer channels_last. NPUs do not support it, and torch before 1.7 does only partly.
        self.memory_format = torch.contiguous_format if device == "npu" or TORCH < (1, 7) else torch.channels_last
        if device == "cpu":
            keep_freed_memory()
            torch.set_num_threads(max(1, available_cores() // local_world_size))
        if device in ("gpu", "npu"):
            self._runtime.set_device(self.device)
        self._copy_stream = self._runtime.Stream(self.device) if device == "gpu" else None
        if device == "npu":
            _set_npu_options(self._runtime)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace
            torch.use_deterministic_algorithms(True)

    # --- the model and what steps it ---

    def place(self, model: nn.Module) -> list[torch.Tensor]:
        """Move an fp32 model to the device and give its weights the precision of the step.

        Returns the parameters that the optimizer steps: fp32 master weights at O2, else the model's own.
        """
        model.to(self.device)
        if self.memory_format != torch.contiguous_format:
            model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        weights: list[torch.Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.half_weights or self.apex is not None:
            return weights
        if self.master_weights:
            weights = [weight.detach().clone().requires_grad_() for weight in weights]
        for layer in model.modules():
            if self.master_weights and isinstance(layer, nn.BatchNorm2d):  # O2 keeps batch norm in fp32
                continue
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(self.half)
            for name, buffer in layer.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(layer, name, buffer.to(self.half))
        return weights

    def prepare_training(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        no_bias_decay: bool = False,
        loss_scale: float | str | None = None,
        clip_grad_norm: float | None = None,
    ) -> MixedPrecisionOptimizer:
        """Place a model and build its optimizer. Returns the MixedPrecisionOptimizer that steps it.

        no_bias_decay: no weight decay for biases and batch norm.
        loss_scale: a number or `dynamic`, used in fp16 only.
        """
        if self.type == "gpu":  # it measures every new input shape, and training has one
            torch.backends.cudnn.benchmark = not self.deterministic
        masters = self.place(model)
        groups: list[dict[str, Any]] = [{"params": masters}]
        if no_bias_decay:
            weights, others = ([master for master in masters if (master.dim() > 1) == large] for large in (True, False))
            groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        optimizer = self._build_sgd(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        scale = (loss_scale or DEFAULT_LOSS_SCALE) if self.precision == "fp16" else 1.0
        if self.apex is not None:
            by_group = [master for group in groups for master in group["params"]]  # the order of apex.master_params
            exact = [master.detach().clone() for master in masters]
            options = {"combine_grad": True} if self.type == "npu" else {}  # Ascend's apex: one buffer of all gradients
            model, optimizer = self.apex.initialize(
                model, optimizer, opt_level=self.opt_level, loss_scale=scale, verbosity=0, **options
            )
            apex_masters = dict(zip(by_group, self.apex.master_params(optimizer)))
            masters, scale = [apex_masters[master] for master in masters], 1.0
            # apex copied its masters from weights that were already half precision.
            for master, weight in zip(masters, exact):
                master.data.copy_(weight)
        return MixedPrecisionOptimizer(
            model, masters, optimizer, loss_scale=scale, clip_grad_norm=clip_grad_norm, apex=self.apex
        )

    def _build_sgd(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """SGD with momentum, fused into one kernel if this torch and device have that."""
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        is_bf16 = groups[0]["params"][0].dtype == torch.bfloat16  # at O3; NpuFusedSGD takes fp32 and fp16
        if self.type == "npu" and hasattr(sys.modules.get("torch_npu"), "optim") and not is_bf16:
            return sys.modules["torch_npu"].optim.NpuFusedSGD(groups, **options)
        if self.type in ("gpu", "cpu") and TORCH >= (2, 4):
            options["fused"] = True
        optimizer = torch.optim.SGD(groups, **options)
        if momentum:  # torch's fused kernel leaves the buffers uninitialized if the very first step is skipped
            for parameter in (parameter for group in groups for parameter in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def wrap_ddp(self, model: nn.Module, grad_compress: str = "none") -> nn.Module:
        """Wrap a model in DistributedDataParallel, which sends no buffers: Communicator.broadcast_buffers does.

        grad_compress: bf16 or fp16 sends the gradients in that format, by DDP's own hooks. static_graph is left out: it
        fails in a first step under no_sync, and gains nothing if every parameter gets a gradient (bench/RESULTS.md).
        """
        names = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
        }
        if TORCH >= (1, 8) and self.type != "npu":  # the fused NPU optimizer keeps gradients in a buffer of its own
            options["gradient_as_bucket_view"] = True
        if self.type in ("gpu", "npu"):
            options["device_ids"] = [self.device.index]
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        if grad_compress != "none":
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            wrapped.register_comm_hook(None, getattr(default_hooks, f"{grad_compress}_compress_hook"))
        return wrapped

    def compile(self, model: nn.Module) -> nn.Module:
        """Compile forward and backward at the first step. Call it on the model that DDP has wrapped.

        Dynamo then splits the graph between DDP's buckets, which are sent while the rest of the backward pass runs.
        """
        try:
            return cast("nn.Module", torch.compile(model, dynamic=False))  # all training batches have one size
        except RuntimeError as error:  # Windows, or a Python newer than this torch knows
            raise DeviceUnavailableError(f"--compile: {first_line(error)}; leave it out") from error

    # --- the step ---

    def autocast(self) -> ContextManager[Any]:
        """The context of the forward pass: autocast at O1, nothing otherwise."""
        if self.half is None or self.half_weights or self.apex is not None:
            return contextlib.nullcontext()
        if TORCH >= (1, 10):
            return torch.autocast(self.device.type, dtype=self.half)
        return self._runtime.amp.autocast()

    def accumulate(self, model: nn.Module, *, last: bool) -> ContextManager[Any]:
        """The context of one batch of a step: DDP sends gradients with the last one only."""
        no_sync = getattr(model, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of a batch to the device. On a GPU this overlaps with the steps still being computed."""
        if self._copy_stream is None:
            return tensor.to(self.device)
        with self._runtime.stream(self._copy_stream):
            tensor = tensor.to(self.device, non_blocking=True)
        compute_stream = self._runtime.current_stream()
        compute_stream.wait_stream(self._copy_stream)
        tensor.record_stream(compute_stream)  # the copy stream must not reuse this memory before the step has ended
        return tensor

    def normalizer(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from (N, S, S, 3) uint8 images on the host to (N, 3, S, S) normalized ones on the device.

        Images travel as bytes, a quarter of the traffic of fp32. mean, std: of each channel, for pixels in [0, 1].
        """
        means = torch.tensor(mean, device=self.device).view(1, 3, 1, 1) * 255
        scale = 1 / (torch.tensor(std, device=self.device).view(1, 3, 1, 1) * 255)

        def normalize(images: torch.Tensor) -> torch.Tensor:
            images = self.to_device(images).permute(0, 3, 1, 2)
            images = images.to(torch.float32, memory_format=self.memory_format).sub_(means).mul_(scale)
            return images.to(self.half) if self.half_weights else images

        return normalize

    def seed(self, seed: int) -> None:
        """Seed torch's generators, including this device's."""
        torch.manual_seed(seed)
        if self.type == "npu":
            self._runtime.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.type != "cpu":
            self._runtime.synchronize()

    # --- around the step ---

    def loader_options(self, workers: int) -> dict[str, Any]:
        """Return the keyword arguments of a DataLoader with that many workers."""
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": self.type == "gpu"}
        if workers and sys.platform == "linux":
            # Python 3.14 would start each worker from scratch, with all imports and a copy of the dataset.
            options["multiprocessing_context"] = "fork"
        if workers and TORCH >= (1, 7):
            options["persistent_workers"] = True
        return options

    @contextlib.contextmanager
    def trace(self, path: str | None, log: Callable[[str], None]) -> Iterator[Any]:
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
            log(f"=> trace written to {path}")

        with library.profile(schedule=schedule, on_trace_ready=write) as profiler:
            yield profiler
        if not written:
            log("=> no trace written: the run ended within the five warm-up steps")

    def name(self) -> str:
        """Return the name of the chip, for the records."""
        if self.type in ("gpu", "npu") and hasattr(self._runtime, "get_device_name"):
            return self._runtime.get_device_name(self.device)
        if self.type == "cpu" and os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.partition(":")[2].strip()
        return self.type


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


def _set_npu_options(npu: Any) -> None:
    if hasattr(npu, "set_compile_mode"):
        npu.set_compile_mode(jit_compile=False)  # prebuilt kernels; none is compiled at run time
    if hasattr(npu, "config"):
        npu.config.allow_internal_format = True  # the chip's own 5-D layout for convolutions


def onnx_export_options() -> dict[str, Any]:
    """Return what makes torch.onnx.export trace: its other exporter, the default since 2.9, also needs onnxscript."""
    return {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
