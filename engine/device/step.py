# SPDX-License-Identifier: BSD-3-Clause
"""From gradients to weights: loss scale, master weights, clipping, skipped steps, the EMA, and their states.

The learning-rate schedule is learning_rate in main.py.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterable, Iterator

from engine.errors import DivergedError

import torch
from torch import nn


class MixedPrecisionOptimizer:
    """Scales the loss, then applies the gradients, or skips the step if one of them is not finite.

    Everything stays on the device: found_inf, the dynamic scale, the count of skips. One pass over the
    gradients gives their norm, which serves the check and the clipping. After an all-reduce the norm is the same on
    every process, so all of them skip alike. If the optimizer does not accept found_inf (torch before 2.4, NPU,
    MPS), the host reads it: one synchronization per step.

    At O2 the batches of a step (--accum-steps) are added in half precision, as apex does. Frozen weights have no fp32
    copy: they are saved as they were rounded.

    Args:
        model: holds the weights that backward fills with gradients.
        master_weights: the parameters that the optimizer steps; the model's own, or fp32 copies of them (O2).
        optimizer: steps master_weights.
        loss_scale: a number, or `dynamic`: start at 65536, halve on overflow, double after 2000 good steps
            (Micikevicius et al., arXiv:1710.03740, with apex's constants).
        clip_grad_norm: largest 2-norm of all gradients together.
        apex: apex.amp, which keeps scale and master weights itself and leaves unscaled gradients in the masters.
    """

    GROWTH_INTERVAL = 2000  # steps
    MAX_SKIPPED = 10  # steps in a row

    def __init__(
        self,
        model: nn.Module,
        master_weights: list[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        loss_scale: float | str = 1.0,
        clip_grad_norm: float | None = None,
        apex: Any = None,
    ) -> None:
        self.model = model
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.master_weights = master_weights
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self.apex = apex
        self.has_master_weights = apex is None and master_weights[0] is not self.weights[0]
        self.dynamic = loss_scale == "dynamic"
        self.scaled = loss_scale != 1
        device = master_weights[0].device
        self.scale = torch.full((), 65536.0 if self.dynamic else float(loss_scale), device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)  # whether the last step was skipped
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int32, device=device)
        self.longest_skip = torch.zeros((), dtype=torch.int32, device=device)  # since it was last read
        self.skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        # A skipped step has already updated batch norm's running statistics; these copies restore them.
        self.good_buffers = [buffer.clone() for buffer in model.buffers()]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the scaled loss to those of the weights."""
        if self.apex is not None:
            with self.apex.scale_loss(loss, self.optimizer) as scaled:
                scaled.backward()
            return
        (loss * self.scale if self.scaled else loss).backward()

    def step(self) -> None:
        """Apply the gradients that backward left, or none of them if one is not finite; then clear them."""
        gradients = self._gradients()
        norm = _total_norm(gradients) / self.scale
        self.skipped = ~torch.isfinite(norm)
        divisor = self.scale
        if self.clip_grad_norm:
            divisor = divisor * (norm / self.clip_grad_norm).clamp(min=1)
        self._step_optimizer(gradients, divisor)
        with torch.no_grad():
            if self.has_master_weights:
                for master, weight in zip(self.master_weights, self.weights):
                    weight.copy_(master)
            for buffer, good in zip(self.model.buffers(), self.good_buffers):
                buffer.copy_(torch.where(self.skipped, good, buffer))
                good.copy_(buffer)
        self._count_skips()
        if self.dynamic:
            self._update_scale()
        self.optimizer.zero_grad()

    def _gradients(self) -> list[torch.Tensor]:
        """Return the gradients that the optimizer applies; at O2 they move to the master weights first."""
        if self.has_master_weights:
            for master, weight in zip(self.master_weights, self.weights):
                if master.grad is None:
                    master.grad = torch.empty_like(master)
                assert weight.grad is not None, "backward() before step()"
                master.grad.copy_(weight.grad)
                weight.grad = None
        return [master.grad for master in self.master_weights if master.grad is not None]

    def _step_optimizer(self, gradients: list[torch.Tensor], divisor: torch.Tensor) -> None:
        """Apply the gradients, divided by `divisor`, unless this step is skipped."""
        if self.skips_on_device:
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = divisor, self.skipped.float()
            optimizer.step()
        elif not self.skipped.item():  # a synchronization
            if self.scaled or self.clip_grad_norm:
                for gradient in gradients:
                    gradient.copy_(gradient.float() / divisor)
            self.optimizer.step()

    def _count_skips(self) -> None:
        # An overflow while the dynamic scale is above 1 only halves it. It does not count toward MAX_SKIPPED.
        counted = self.skipped & (self.scale <= 1) if self.dynamic else self.skipped
        zero = torch.zeros_like(self.skipped_in_a_row)
        self.skipped_in_a_row = torch.where(counted, self.skipped_in_a_row + 1, zero)
        self.longest_skip = torch.max(self.longest_skip, self.skipped_in_a_row)

    def _update_scale(self) -> None:
        """Halve the dynamic scale after an overflow, double it after GROWTH_INTERVAL good steps."""
        zero = torch.zeros_like(self.good_steps)
        self.good_steps = torch.where(self.skipped, zero, self.good_steps + 1)
        grow = self.good_steps >= self.GROWTH_INTERVAL
        self.scale = torch.where(self.skipped, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.good_steps = torch.where(grow, zero, self.good_steps)

    def read_longest_skip(self) -> int:
        """Return the largest number of steps skipped in a row since the last call. A synchronization."""
        longest = int(self.longest_skip.item())
        self.longest_skip = self.skipped_in_a_row.clone()
        return longest

    def check_finite(self, step: int) -> None:
        """Raise DivergedError if ten steps in a row were skipped; alike on every process. A synchronization."""
        if self.read_longest_skip() >= self.MAX_SKIPPED:
            raise DivergedError(
                f"the gradients of {self.MAX_SKIPPED} steps in a row were not finite (found at step {step}): training "
                "has diverged; resume from the last checkpoint with a lower --lr, with --clip-grad-norm 1 or with more "
                "--warmup-epochs"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, and apex's own state if it is used. A synchronization."""
        state = {
            "loss_scale": self.scale.item(),
            "dynamic": self.dynamic,
            "good_steps": self.good_steps.item(),
            "skipped_in_a_row": self.skipped_in_a_row.item(),
        }
        return {**self.apex.state_dict(), **state} if self.apex is not None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what state_dict returned, or the reference's: apex's state alone."""
        if self.apex is not None:
            self.apex.load_state_dict({key: value for key, value in state.items() if key.startswith("loss_scaler")})
        if "good_steps" not in state:
            return
        # A run in fp32 or bf16 has a scale of 1, which would take a dynamic one hours to grow from.
        if self.dynamic and state.get("dynamic", state["loss_scale"] != 1):
            self.scale.fill_(float(state["loss_scale"]))
            self.good_steps.fill_(int(state["good_steps"]))
        self.skipped_in_a_row.fill_(int(state["skipped_in_a_row"]))

    def model_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict in fp32 on the CPU, with the master weights in place of half-precision ones."""
        return _fp32_state_dict(self.model, zip(self.weights, self.master_weights))

    def optimizer_state_dict(self) -> dict[str, Any]:
        """Return what torch.optim.SGD.state_dict returns on current torch, in fp32, from any torch and device.

        It is one group even with --no-bias-decay; its weight decay is that of the matrices.
        """
        options = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        momentum = {}
        for position, parameter in enumerate(self.master_weights):
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                momentum[position] = {"momentum_buffer": buffer.to("cpu", torch.float32)}
        return {"state": momentum, "param_groups": [{**options, "params": list(range(len(self.master_weights)))}]}

    def load_optimizer_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state dict of torch's SGD, matching momentum buffers to parameters by position.

        Raises:
            ValueError: if their number or shapes do not match.
        """
        order = [key for group in state["param_groups"] for key in group["params"]]  # torch 1.5 numbers them by id()
        if len(order) != len(self.master_weights):
            raise ValueError(f"expected the state of {len(self.master_weights)} parameters, got {len(order)}")
        for position, (key, parameter) in enumerate(zip(order, self.master_weights)):
            momentum = state["state"].get(key, {}).get("momentum_buffer")
            if momentum is None:  # never stepped
                continue
            if momentum.shape != parameter.shape:
                expected, got = tuple(parameter.shape), tuple(momentum.shape)
                raise ValueError(f"momentum of parameter {position}: expected shape {expected}, got {got}")
            # Copied into a new buffer: the fused kernels need the parameter's own memory format.
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).copy_(momentum)


class ModelEma:
    """An exponential moving average, in fp32, of a model's weights and of its batch norm statistics.

    Args:
        model: the model.
        weights: its trainable weights.
        master_weights: what is averaged for each of them: the weights themselves, or their fp32 master weights.
    """

    def __init__(self, model: nn.Module, weights: list[nn.Parameter], master_weights: list[torch.Tensor]) -> None:
        self.model = model
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.model_tensors: list[torch.Tensor] = [*weights, *buffers]  # what the EMA is swapped into
        self.tracked = master_weights + buffers  # what is averaged
        self.ema = [tensor.detach().to(torch.float32, copy=True) for tensor in self.tracked]

    def update(self, decay: float, step: int, skipped: torch.Tensor) -> None:
        """ema = decay · ema + (1 - decay) · weight, except after a skipped step. No synchronization.

        The first steps decay faster: min(decay, (1 + step) / (10 + step)), as TensorFlow's
        ExponentialMovingAverage(num_updates) does. skipped: () bool on the device.
        """
        with torch.no_grad():
            weight = (~skipped).float() * (1 - min(decay, (1 + step) / (10 + step)))
            for ema, tensor in zip(self.ema, self.tracked):
                ema.lerp_(tensor.float(), weight)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A context in which the model computes with the EMA."""
        own = [tensor.data for tensor in self.model_tensors]
        for tensor, ema in zip(self.model_tensors, self.ema):
            tensor.data = ema.to(tensor.dtype)
        try:
            yield
        finally:
            for tensor, data in zip(self.model_tensors, own):
                tensor.data = data

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict in fp32 on the CPU, with the EMA in place."""
        return _fp32_state_dict(self.model, zip(self.model_tensors, self.ema))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what state_dict returned. Raises ValueError, or KeyError if a tensor is missing."""
        own = {id(tensor): ema for tensor, ema in zip(self.model_tensors, self.ema)}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) in own:
                ema = own[id(tensor)]
                expected, got = tuple(ema.shape), tuple(state[name].shape)
                if expected != got:
                    raise ValueError(f"EMA of {name}: expected shape {expected}, got {got}")
                ema.copy_(state[name])


def _fp32_state_dict(
    model: nn.Module, replacements: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return model.state_dict() in fp32 on the CPU, with a value in place of each (tensor, value) in replacements."""
    values = {id(tensor): value for tensor, value in replacements}
    state = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = values.get(id(tensor), state[name])
    for name, value in state.items():
        state[name] = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
    return state


def _total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, accumulated in fp32: () float32 on their device."""
    if hasattr(nn.utils, "get_total_norm") and gradients[0].dtype == torch.float32:
        return nn.utils.get_total_norm(gradients)
    return torch.stack([gradient.norm(p=2, dtype=torch.float32) for gradient in gradients]).norm()  # type: ignore[call-overload]
