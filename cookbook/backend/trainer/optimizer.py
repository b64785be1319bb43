"""AdamW in float32 with hyper-parameters given at every step, gradient normalization and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cookbook.errors import RequestRejected

__all__ = ["AdamParams", "GradientNormalization", "Optimizer", "StepResult"]

GradientNormalization = Literal["none", "num_loss_tokens", "num_sequences"]


@dataclass(frozen=True)
class AdamParams:
    """Hyper-parameters of one step. `weight_decay` is decoupled; `grad_clip_norm` bounds the global norm, 0 = off."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float


@dataclass(frozen=True)
class StepResult:
    """Global L2 norms of the gradient, after normalization, before and after clipping; `num_weights` it is over."""

    grad_norm: float
    grad_norm_post_clip: float
    num_weights: int


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over named float32 parameters; owns their moments."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._adamw = torch.optim.AdamW(self._parameters.values(), fused=True)
        self.steps = 0

    def step(self, params: AdamParams, divisor: float) -> StepResult:
        """Divide the gradients by `divisor`, clip, update the weights, and clear the gradients.

        RequestRejected, with weights and moments untouched, when the norm is not finite.
        """
        gradients = self._gradients()
        norm = float(torch.nn.utils.get_total_norm(gradients)) / divisor
        if not math.isfinite(norm):
            raise RequestRejected(
                f"the norm of the accumulated gradient is {norm}: no step was made and the gradient was dropped. "
                "Lower the learning rate or the advantages, or load an earlier checkpoint."
            )
        self._ensure_moments()
        is_clipped = 0 < params.grad_clip_norm < norm
        scale = (params.grad_clip_norm / norm if is_clipped else 1.0) / divisor
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        self._adamw.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._adamw.step()
        self.steps += 1
        self.clear_gradients()
        num_weights = sum(gradient.numel() for gradient in gradients)
        return StepResult(norm, params.grad_clip_norm if is_clipped else norm, num_weights)

    def clear_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def moments(self) -> dict[str, Tensor]:
        """The moments by `exp_avg.<name>` and `exp_avg_sq.<name>`; empty before the first step."""
        return {
            f"{moment}.{name}": self._adamw.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
            if parameter in self._adamw.state
        }

    def restore(self, steps: int, moments: Mapping[str, Tensor]) -> None:
        """Take over moments as `moments()` gave them after `steps` steps; 0 and nothing = a fresh optimizer."""
        self._adamw.state.clear()
        self.steps = steps
        if steps:
            for name, parameter in self._parameters.items():
                first, second = moments[f"exp_avg.{name}"], moments[f"exp_avg_sq.{name}"]
                self._adamw.state[parameter] = _moments(steps, first, second)

    def _ensure_moments(self) -> None:
        """Allocated here and not inside the step, so that a lack of memory leaves none of them behind."""
        if not self._adamw.state:
            parameters = list(self._parameters.values())
            fresh = [_moments(0, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
            self._adamw.state.update(zip(parameters, fresh, strict=True))

    def _gradients(self) -> list[Tensor]:
        """All gradients; zeros where a weight got none, so that its moments decay like the others'."""
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients


def _moments(steps: int, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return {"step": torch.tensor(float(steps)), "exp_avg": first.detach(), "exp_avg_sq": second.detach()}
