# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for a GPU that computes nothing, of torch's fake tensors: they have a device, a shape and no values.

Reading a value raises an error, and copies between the host and the GPU are recorded. Not tested by it: kernels,
streams, memory formats, and the backward pass, which needs a driver.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

from engine.device import MixedPrecisionOptimizer

import torch
from torch import nn


@contextlib.contextmanager
def fake_gpu(monkeypatch: Any) -> Iterator[list[torch.dtype]]:
    """A context in which device `gpu` can be used. Yields the data types of the tensors copied to or from it.

    Build the network under torch.device("cuda", 0): fake parameters cannot be moved.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    copied: list[torch.dtype] = []

    def devices(values: Any) -> set[str]:
        return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.dim()}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_fused_sgd_" in str(func):  # has no fake implementation
                assert devices((args, kwargs)) == {"cuda"}
                return None
            result = func(*args, **(kwargs or {}))
            if len(devices((args, kwargs, result))) > 1:
                copied.append(result.dtype)
            return result

    def backward(scaler: MixedPrecisionOptimizer, loss: torch.Tensor) -> None:
        assert loss.device.type == "cuda" and loss.dim() == 0 and loss.dtype == torch.float32
        for weight in scaler.weights:
            weight.grad = torch.zeros_like(weight)

    def to(module: nn.Module, target: Any = None, **_: Any) -> nn.Module:
        for tensor in [*module.parameters(), *module.buffers()] if isinstance(target, torch.dtype) else []:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(target)
        return module

    monkeypatch.setattr(MixedPrecisionOptimizer, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    with FakeTensorMode(), Recorder():
        yield copied
