"""The record that every loss kernel takes and the one it returns, and the rules for a kernel's config keys.

The formulas are in cross_entropy.py and policy.py; the dict of all kernels by name is in kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from cookbook.errors import ConfigError, Problem, ShapeError

__all__ = ["ConfigKey", "Kernel", "LossConfig", "LossInput", "LossOutput"]

LossConfig = Mapping[str, float | None]
"""A kernel's checked config: every allowed key is present; None = not set and without a default."""


@dataclass(frozen=True)
class LossInput:
    """One datum as a kernel sees it. All tensors have one shape, (T,) or (T, K) with K targets a position.

    policy_logprobs: natural-log probabilities of the target tokens under the current weights; carries gradient.
    old_logprobs: the same under the weights that sampled or anchored them; no gradient.
    advantages: per token; 0 = the token is not trained.
    weights: per token, any real number; 0 = the token is not trained.
    """

    policy_logprobs: Tensor
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None

    def required(self, name: str) -> Tensor:
        """The tensor `name`. ShapeError when it is absent or its shape is not that of `policy_logprobs`."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ShapeError(f"{name} is missing. Send one number for each of the target tokens.")
        if value.shape != self.policy_logprobs.shape:
            raise ShapeError(
                f"{name} has shape {tuple(value.shape)}, the target tokens {tuple(self.policy_logprobs.shape)}. "
                "Send one number for each of the target tokens."
            )
        return value


@dataclass(frozen=True)
class LossOutput:
    """A kernel's result for one datum.

    loss: scalar, the raw sum over the datum's tokens, in nats times the weight's or advantage's unit.
    metrics: counts to be summed over datums, keyed `name:sum` as the training API's wire protocol wants them.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigKey:
    """One allowed config key: default (None = off), and the closed range of allowed values."""

    default: float | None
    minimum: float = 0.0
    maximum: float = math.inf


@dataclass(frozen=True)
class Kernel:
    """A loss by name: its formula, the tensors it needs (fields of LossInput) and the config keys it understands.

    `trained_where` is the input whose non-zero entries are the loss tokens: only there is d loss / d logprob not 0.
    """

    name: str
    formula: Callable[[LossInput, LossConfig], LossOutput]
    inputs: tuple[str, ...]
    trained_where: Literal["weights", "advantages"]
    config_keys: Mapping[str, ConfigKey] = field(default_factory=dict)

    def loss_tokens(self, datum: LossInput) -> Tensor:
        """Bool, the positions that count as loss tokens. Weights and advantages of any sign count."""
        return datum.required(self.trained_where) != 0

    def check_config(self, given: Mapping[str, object]) -> LossConfig:
        """Fill in defaults. ConfigError names every wrong key and value and says which are allowed."""
        problems = [problem for key, value in given.items() if (problem := self._problem(key, value))]
        checked = {key: rule.default for key, rule in self.config_keys.items()}
        checked.update({key: float(value) for key, value in given.items() if isinstance(value, int | float)})
        low, high = checked.get("clip_low_threshold"), checked.get("clip_high_threshold")
        if not problems and low is not None and high is not None and low > high:
            what = f"{low} is above clip_high_threshold, {high}."
            problems.append(Problem("clip_low_threshold", what, "Both are bounds of the ratio, such as 0.8 and 1.2."))
        if problems:
            raise ConfigError(problems)
        return checked

    def _problem(self, key: str, value: object) -> Problem | None:
        rule = self.config_keys.get(key)
        if rule is None:
            allowed = ", ".join(sorted(self.config_keys)) or "none"
            return Problem(key, f"is not a config key of the loss {self.name}.", f"Allowed keys: {allowed}.")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and rule.minimum <= value <= rule.maximum and math.isfinite(value):  # type: ignore[operator,arg-type]
            return None
        remedy = f"Use a finite number from {rule.minimum} to {rule.maximum}."
        return Problem(key, f"must be a number in range for the loss {self.name}, got {value!r}.", remedy)
