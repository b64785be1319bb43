"""What sampler and trainer differ in: the weights that correct for it, and the numbers that show it."""

from __future__ import annotations

import torch
from torch import Tensor

from cookbook.errors import ShapeError

__all__ = ["TIS_LEVELS", "gap_metrics", "tis_weights"]

TIS_LEVELS = ("token", "sequence")
_LOG_CAP = 20.0
_INSIDE = (0.9, 1.1)


def tis_weights(
    old_logprobs: Tensor, sampling_logprobs: Tensor, is_trained: Tensor, *, cap: float, level: str
) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: weights from the distribution that sampled to the policy that is optimized.

    token:     w_t = min(exp(clip(o_t - b_t, -20, 20)), cap)
    sequence:  w = min(exp(mean_t clip(o_t - b_t, -20, 20)), cap), the geometric mean over the trained tokens

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the cap of IMPALA,
    Espeholt et al. 2018, arXiv:1802.01561, section 4.1.

    Args:
        old_logprobs: o, (T,), nats, of the policy where the loss has its ratio 1.
        sampling_logprobs: b, (T,), nats, of the distribution that the tokens were drawn from, temperature applied.
        is_trained: bool (T,), at least one true; injected tokens are false.
        cap: largest weight.
        level: token or sequence.

    Returns:
        The weights (T,), 0 where not trained, and bool (T,): where the cap has cut one.

    Raises:
        ShapeError: the three differ in shape, nothing is trained, or the level is unknown.
    """
    if not old_logprobs.shape == sampling_logprobs.shape == is_trained.shape:
        raise ShapeError(
            f"old_logprobs has shape {tuple(old_logprobs.shape)}, sampling_logprobs {tuple(sampling_logprobs.shape)}, "
            f"is_trained {tuple(is_trained.shape)}. All three are of the tokens of one completion."
        )
    if level not in TIS_LEVELS:
        raise ShapeError(f"tis.level must be one of {', '.join(TIS_LEVELS)}, got {level!r}.")
    if not bool(is_trained.any()):
        raise ShapeError("a completion without a trained token has no weights. Leave it out.")
    log_ratio = (old_logprobs - sampling_logprobs).detach().clamp(-_LOG_CAP, _LOG_CAP)
    if level == "sequence":
        log_ratio = log_ratio[is_trained].mean().expand_as(log_ratio)
    ratio = log_ratio.exp()
    return torch.where(is_trained, ratio.clamp(max=cap), 0.0), is_trained & (ratio > cap)


def gap_metrics(policy_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, float]:
    """How far trainer and sampler are apart on the same tokens; both at temperature 1 over the full vocabulary.

    With d = policy - rollout, in nats a token. Their mean looks fine while single tokens are far off, so not the mean
    but quantiles of |d|, the largest, the share of ratios exp(d) outside [0.9, 1.1], and the mean of
    k3 = exp(d) - d - 1, an estimate of KL(rollout || policy). Right after a weight sync all are close to 0.

    Args:
        policy_logprobs, rollout_logprobs: (N,), N >= 1, of all trained tokens of a step.
    """
    difference = (policy_logprobs - rollout_logprobs).detach().double()
    size = difference.abs()
    ratio = difference.exp()
    is_outside = (ratio < _INSIDE[0]) | (ratio > _INSIDE[1])
    return {
        "sampler/logprob_gap_p50": float(size.quantile(0.5)),
        "sampler/logprob_gap_p99": float(size.quantile(0.99)),
        "sampler/logprob_gap_max": float(size.max()),
        "sampler/ratio_outside_share": float(is_outside.double().mean()),
        "sampler/k3": float((difference.expm1() - difference).mean()),
    }
