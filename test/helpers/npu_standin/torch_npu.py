# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for torch_npu that computes, for tests: a device named npu over this machine's memory.

Put this folder on sys.path, and the path of the built backend.cpp (see build.py) into NPU_STANDIN. Then torch.npu has
two devices; every operator is computed by the CPU, and torch.distributed has a backend hccl, which is gloo. Autocast
casts convolutions and linear layers.

It shows that main.py's calls of torch and torch_npu exist and fit together on a device that is not the CPU, and which
operators a step uses (`torch.ops.npu_standin.take_calls()`). It cannot show what Ascend's kernels compute or lack, the
chip's own memory layouts, HCCL, streams that run beside each other, or any speed.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future

torch.ops.load_library(os.environ["NPU_STANDIN"])


class Runtime(types.ModuleType):
    """torch.npu"""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return torch._C._accelerator_getDeviceIndex()

    def set_device(self, device: Any) -> None:
        torch._C._accelerator_setDeviceIndex(torch.device(device).index)

    def synchronize(self, device: Any = None) -> None:
        pass

    def set_compile_mode(self, jit_compile: bool) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        """Random numbers are the CPU's, whose generator torch.manual_seed seeds."""

    manual_seed_all = manual_seed

    def get_device_name(self, device: Any = None) -> str:
        return "a stand-in for an NPU"


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", Runtime("torch.npu"))


class NpuFusedSGD(torch.optim.SGD):
    """Keeps the gradients of each group in one buffer, and sets them to 0, not to None, as torch_npu's does."""

    def __init__(
        self, params: Any, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, foreach=False)
        self.buffers: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups if not self.buffers else ():
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if any(weight.dtype not in (torch.float32, torch.float16) for weight in weights):
                raise TypeError("NpuFusedSGD takes float32 and float16")
            self.buffers.append(torch.cat([weight.grad.reshape(-1) for weight in weights]))  # type: ignore[union-attr]
            for weight, part in zip(weights, self.buffers[-1].split([weight.numel() for weight in weights])):
                weight.grad = part.view(weight.shape)
        super().step()

    def zero_grad(self, set_to_none: bool = False) -> None:
        for buffer in self.buffers:
            buffer.zero_()


optim = types.ModuleType("torch_npu.optim")
optim.NpuFusedSGD = NpuFusedSGD  # type: ignore[attr-defined]
sys.modules["torch_npu.optim"] = optim


class Hccl(dist.ProcessGroup):
    """gloo, on copies of the tensors."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "hccl"

    def _run(self, collective: Callable[[list], Any], tensors: Iterable[torch.Tensor]) -> Any:
        tensors = list(tensors)
        copies = [tensor.cpu() for tensor in tensors]
        collective(copies).wait()
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(tensors)
        return _create_work_from_future(future)

    def allreduce(self, tensors: Any, options: Any = None) -> Any:
        return self._run(lambda copies: self.gloo.allreduce(copies, options or dist.AllreduceOptions()), tensors)

    def broadcast(self, tensors: Any, options: Any = None) -> Any:
        return self._run(lambda copies: self.gloo.broadcast(copies, options or dist.BroadcastOptions()), tensors)

    def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        sources = [tensor.cpu() for tensor in inputs]
        flat = [tensor for output in outputs for tensor in output]
        return self._run(lambda copies: self.gloo.allgather([copies], sources), flat)


dist.Backend.register_backend("hccl", Hccl, devices=["npu"])
