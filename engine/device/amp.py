# SPDX-License-Identifier: BSD-3-Clause
"""Mixed precision, whole: autocast, half-precision and master weights, loss scale, clipping, skipped steps, states.

The learning-rate schedule is learning_rate in main.py.
"""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, Iterable

from engine.device.choice import load_apex, needs_apex
from engine.device.compute import ComputeDevice
from engine.errors import DivergedError
from engine.versions import TORCH

import torch
from torch import nn

DEFAULT_LOSS_SCALE = 1024.0  # of fp16


class Amp:
    """The precision of the step on a device.

    Args:
        precision: fp32, fp16 or bf16.
        opt_level: O1 computes in half precision by autocast, O2 and O3 hold the weights in it; O2 keeps master weights.

    Attributes:
        input_dtype: of the images that the model takes.
    """

    def __init__(self, device: ComputeDevice, precision: str = "fp32", opt_level: str = "O1") -> None:
        self.device, self.precision, self.opt_level = device, precision, opt_level
        self.half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self.half_weights = self.half is not None and opt_level in ("O2", "O3")
        self.input_dtype = self.half if self.half is not None and self.half_weights else torch.float32
        self.apex = load_apex() if self.half is not None and needs_apex(device.type) else None

    def convert(self, model: nn.Module) -> list[torch.Tensor]:
        """Give the weights of an fp32 model the precision of the step.

        Returns the parameters that the optimizer steps: fp32 master weights at O2, else the model's own.
        """
        weights: list[torch.Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.half_weights or self.apex is not None:
            return weights
        if self.opt_level == "O2":
            weights = [weight.detach().clone().requires_grad_() for weight in weights]
        for layer in model.modules():
            if self.opt_level == "O3" or isinstance(layer, (nn.Conv2d, nn.Linear)):  # O2 keeps batch norm in fp32
                layer.to(self.half)
        return weights

    def parameter_groups(
        self, model: nn.Module, weights: list[torch.Tensor], *, features_lr: float, no_bias_decay: bool
    ) -> list[dict[str, Any]]:
        """Return the weights that `convert` has returned in groups for torch.optim.SGD.

        features_lr: factor of the learning rate of model.features. no_bias_decay: no weight decay for biases and batch
        norm, which have one dimension.
        """
        groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, weight in zip(names, weights):
            slow, plain = features_lr != 1 and name.startswith("features."), no_bias_decay and weight.dim() == 1
            groups.setdefault((slow, plain), []).append(weight)
        return [
            {
                "params": groups[slow, plain],
                **({"lr_factor": features_lr} if slow else {}),
                **({"weight_decay": 0.0} if plain else {}),
            }
            for slow, plain in sorted(groups)  # first the classifier's matrices: optimizer_state_dict has their options
        ]

    def optimizer(
        self,
        model: nn.Module,
        sgd: torch.optim.Optimizer,
        weights: list[torch.Tensor],
        *,
        loss_scale: float | str | None = None,
        clip_grad_norm: float | None = None,
    ) -> MixedPrecisionOptimizer:
        """Return what steps the weights that `convert` has returned, by torch.optim.SGD over them.

        loss_scale: a number or `dynamic`, used in fp16 only.
        """
        sgd = self.device.prepare_sgd(sgd)
        scale = (loss_scale or DEFAULT_LOSS_SCALE) if self.precision == "fp16" else 1.0
        if self.apex is not None:
            by_group = [weight for group in sgd.param_groups for weight in group["params"]]  # as apex.master_params
            exact = [weight.detach().clone() for weight in weights]
            # Ascend's apex can keep all gradients in one buffer.
            options = {"combine_grad": True} if self.device.type == "npu" else {}
            model, sgd = self.apex.initialize(
                model, sgd, opt_level=self.opt_level, loss_scale=scale, verbosity=0, **options
            )
            masters = dict(zip(by_group, self.apex.master_params(sgd)))
            weights, scale = [masters[weight] for weight in weights], 1.0
            # apex copied its masters from weights that were already half precision.
            for master, weight in zip(weights, exact):
                master.data.copy_(weight)
        return MixedPrecisionOptimizer(
            model, weights, sgd, loss_scale=scale, clip_grad_norm=clip_grad_norm, apex=self.apex
        )

    def autocast(self) -> ContextManager[Any]:
        """The context of the forward pass: autocast at O1, nothing otherwise."""
        if self.half is None or self.half_weights or self.apex is not None:
            return contextlib.nullcontext()
        if TORCH >= (1, 10):
            return torch.autocast(self.device.device.type, dtype=self.half)
        return self.device.runtime.amp.autocast()


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
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int32, device=device)  # from MAX_SKIPPED on it only grows
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
        self._update_scale()
        self.optimizer.zero_grad()

    def _gradients(self) -> list[torch.Tensor]:
        """Return the gradients that the optimizer applies; at O2 they move to the master weights first."""
        if self.has_master_weights:
            for master, weight in zip(self.master_weights, self.weights):
                if master.grad is None:  # else kept: the fused NPU optimizer makes it a view of its own buffer
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

    def _update_scale(self) -> None:
        """Count skipped steps. Halve a dynamic scale after one, double it after GROWTH_INTERVAL good steps."""
        counted = self.skipped
        if self.dynamic:
            counted = counted & (self.scale <= 1)  # an overflow above that only halves the scale
            self.good_steps = (self.good_steps + 1) * ~self.skipped
            grow = self.good_steps >= self.GROWTH_INTERVAL
            self.good_steps = self.good_steps * ~grow
            self.scale = torch.where(self.skipped, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        diverged = self.skipped_in_a_row >= self.MAX_SKIPPED
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * (counted | diverged)

    def check_finite(self, step: int) -> None:
        """Raise DivergedError if ten steps in a row were skipped; alike on every process. A synchronization."""
        if self.skipped_in_a_row.item() >= self.MAX_SKIPPED:
            raise DivergedError(
                f"the gradients of {self.MAX_SKIPPED} steps in a row were not finite (found at step {step}): training "
                "has diverged; resume from the last checkpoint with a lower --lr, with --clip-grad-norm 1 or with more "
                "--warmup-epochs"
            )

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

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
        return fp32_state_dict(self.model, zip(self.weights, self.master_weights))

    def optimizer_state_dict(self) -> dict[str, Any]:
        """Return what torch.optim.SGD.state_dict returns on current torch, in fp32, from any torch and device.

        It is one group even with --no-bias-decay and --features-lr; its options are those of the classifier's matrices.
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
            raise ValueError(
                f"expected the state of {len(self.master_weights)} parameters, got {len(order)}, as with another "
                "--freeze-blocks"
            )
        for position, (key, parameter) in enumerate(zip(order, self.master_weights)):
            momentum = state["state"].get(key, {}).get("momentum_buffer")
            if momentum is None:  # never stepped
                continue
            if momentum.shape != parameter.shape:
                expected, got = tuple(parameter.shape), tuple(momentum.shape)
                raise ValueError(f"momentum of parameter {position}: expected shape {expected}, got {got}")
            # Copied into a new buffer: the fused kernels need the parameter's own memory format.
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).copy_(momentum)


def fp32_state_dict(
    model: nn.Module, replacements: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return model.state_dict() in fp32 on the CPU, with a value in place of each (tensor, value) in replacements."""
    values = {id(tensor): value for tensor, value in replacements}
    state = model.state_dict(keep_vars=True)  # the tensors themselves
    for name, tensor in state.items():
        value = values.get(id(tensor), tensor).detach()
        state[name] = value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
    return state


def _total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, accumulated in fp32: () float32 on their device."""
    if hasattr(nn.utils, "get_total_norm") and gradients[0].dtype == torch.float32:
        # On an NPU, _foreach_norm can meet a tensor in the chip's own layout, which it does not support.
        return nn.utils.get_total_norm(gradients, foreach=False if gradients[0].device.type == "npu" else None)
    return torch.stack([gradient.norm(p=2, dtype=torch.float32) for gradient in gradients]).norm()  # type: ignore[call-overload]
