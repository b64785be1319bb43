"""Policy losses by their name in a config, on top of the kernels that a trainer has: which kernel with which config,
the correction for the sampler folded into the advantages, and the KL term. What of it runs where is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cookbook.errors import ShapeError
from cookbook.losses.correction import tis_weights
from cookbook.losses.kernels import KERNELS
from cookbook.losses.kl import kl_terms
from cookbook.losses.records import LossInput

__all__ = [
    "Anchor",
    "CompletionTokens",
    "PolicyLossOutput",
    "PolicyObjective",
    "Tis",
    "policy_loss",
    "token_advantages",
]

Anchor = Literal["rollout", "old_policy", "sampling"]
"""Where a loss has its ratio 1: the sampler's logprobs at temperature 1; the trainer's before this update; those of the
distribution that was drawn from."""


@dataclass(frozen=True)
class Tis:
    """Truncated importance sampling, see cookbook/losses/correction.py."""

    cap: float
    level: str


@dataclass(frozen=True)
class PolicyObjective:
    """A policy loss, complete: sum over the trained tokens of kernel(l, o, A w) + kl_beta KL(l, r).

    The kernels are linear in the advantage, up to its sign and to where it is 0; so a weight w > 0 of the token is
    exact as A w, and a trainer needs no input for it. In dro it weighs the reward term only, not the penalty.
    """

    name: str
    """As in the config."""
    kernel: str
    """Name of the trainer's kernel with the same formula."""
    kernel_config: Mapping[str, float]
    """The kernel's config keys, as on the wire."""
    anchor: Anchor
    tis: Tis | None
    """None = no correction: the loss is anchored at what was sampled."""
    kl_beta: float = 0.0
    kl_estimator: str = "k3"

    def __post_init__(self) -> None:
        KERNELS[self.kernel].check_config(self.kernel_config)

    @property
    def is_builtin(self) -> bool:
        """Whether a trainer can evaluate all of it: no kernel takes a reference, so only without a KL term."""
        return self.kl_beta == 0.0


@dataclass(frozen=True)
class CompletionTokens:
    """The tokens of one completion. All tensors are (T,), T >= 1, float of one dtype, in nats; `is_trained` is bool."""

    policy_logprobs: Tensor
    """Of the current weights; carries gradient."""
    old_logprobs: Tensor
    """Where the ratio is 1, see `Anchor`."""
    sampling_logprobs: Tensor
    is_trained: Tensor
    """False for injected tokens, whose logprobs are never looked at."""
    advantage: float
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class PolicyLossOutput:
    """loss: scalar, the raw sum over the completion's tokens. `sums`: over its trained tokens, for metrics.

    `sums` has `clipped` where the loss clips, `tis_weight` and `tis_truncated` where it is corrected, and `kl`, nats,
    where there is a reference, also with kl_beta 0.
    """

    loss: Tensor
    sums: dict[str, float]


def token_advantages(
    objective: PolicyObjective, old_logprobs: Tensor, sampling_logprobs: Tensor, is_trained: Tensor, advantage: float
) -> tuple[Tensor, dict[str, float]]:
    """A w for each token, (T,), 0 where not trained: what the kernel gets as `advantages`; and the weights' sums."""
    if objective.tis is None:
        return is_trained.to(old_logprobs.dtype) * advantage, {}
    weights, is_cut = tis_weights(
        old_logprobs, sampling_logprobs, is_trained, cap=objective.tis.cap, level=objective.tis.level
    )
    return weights * advantage, {"tis_weight": float(weights.sum()), "tis_truncated": float(is_cut.sum())}


def policy_loss(objective: PolicyObjective, tokens: CompletionTokens) -> PolicyLossOutput:
    """The loss of one completion, a raw sum over its tokens, differentiable in `policy_logprobs`.

    The formulas and their sources are those of the kernels (cookbook/losses/policy.py), of `tis_weights` and of
    `kl_terms`. The KL term counts for every trained token, also where the advantage is 0.

    Raises:
        ShapeError: tensors differ in shape, or kl_beta is above 0 and there are no reference logprobs.
    """
    kernel = KERNELS[objective.kernel]
    advantages, sums = token_advantages(
        objective, tokens.old_logprobs, tokens.sampling_logprobs, tokens.is_trained, tokens.advantage
    )
    datum = LossInput(tokens.policy_logprobs, old_logprobs=tokens.old_logprobs.detach(), advantages=advantages)
    output = kernel.formula(datum, kernel.check_config(objective.kernel_config))
    loss = output.loss
    if "clipped_tokens:sum" in output.metrics:
        sums["clipped"] = output.metrics["clipped_tokens:sum"]
    kl = _kl_sum(objective, tokens)
    if kl is not None:
        loss = loss + objective.kl_beta * kl
        sums["kl"] = float(kl.detach())
    return PolicyLossOutput(loss, sums)


def _kl_sum(objective: PolicyObjective, tokens: CompletionTokens) -> Tensor | None:
    reference = tokens.reference_logprobs
    if reference is None:
        if objective.kl_beta > 0:
            raise ShapeError(
                f"kl_beta is {objective.kl_beta}, but there are no reference_logprobs. Score the completions with the "
                "reference, or set kl_beta to 0."
            )
        return None
    if reference.shape != tokens.policy_logprobs.shape:
        raise ShapeError(
            f"reference_logprobs has {reference.numel()} numbers for a completion of "
            f"{tokens.policy_logprobs.numel()} tokens. Send one for each token of the completion."
        )
    is_trained = tokens.is_trained
    return torch.sum(kl_terms(tokens.policy_logprobs[is_trained], reference[is_trained], objective.kl_estimator))
