"""Policy-gradient kernels: importance_sampling, ppo, cispo, dro, dapo and gspo.

Notation: l = log-probability under the current weights, o = the same under the old ones, A = advantage,
r = exp(clip(l - o, -cap, cap)). All losses are raw sums over tokens; positions with A = 0 contribute nothing.
Clip thresholds are bounds of the ratio (0.8 and 1.2), not distances from 1. sg() stops the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cookbook.losses.records import LossConfig, LossInput, LossOutput

__all__ = ["cispo", "dapo", "dro", "gspo", "importance_sampling", "ppo"]


def importance_sampling(datum: LossInput, config: LossConfig) -> LossOutput:
    """loss = sum -r A; d loss / d l = -A r, and 0 where the log-ratio is capped."""
    advantages = datum.required("advantages")
    return _output(-_ratio(datum, config) * advantages, advantages)


def ppo(datum: LossInput, config: LossConfig) -> LossOutput:
    """loss = sum -min(r A, clip(r, low, high) A).

    Schulman et al. 2017, arXiv:1707.06347, equation 7. d loss / d l = -A r, and 0 where the clip binds: A > 0 and
    r > high, or A < 0 and r < low.
    """
    advantages = datum.required("advantages")
    ratio = _ratio(datum, config)
    return _output(_clipped_surrogate(ratio, advantages, config), advantages, _binds(ratio, advantages, config))


def dapo(datum: LossInput, config: LossConfig) -> LossOutput:
    """ppo with a wider upper bound, and with `eps_clip_c` = c > 1 the dual clip: min(-c A, surrogate) where A < 0.

    Yu et al. 2025, arXiv:2503.14476, equation 8; dual clip: Ye et al. 2019, arXiv:1912.09729.
    d loss / d l is as in ppo, and also 0 where A < 0 and r > c.
    """
    advantages = datum.required("advantages")
    ratio = _ratio(datum, config)
    losses = _clipped_surrogate(ratio, advantages, config)
    binds = _binds(ratio, advantages, config)
    cap = config["eps_clip_c"]
    if cap is not None:
        losses = torch.where(advantages < 0, torch.minimum(-cap * advantages, losses), losses)
        binds = binds | ((advantages < 0) & (ratio.detach() > cap))
    return _output(losses, advantages, binds)


def cispo(datum: LossInput, config: LossConfig) -> LossOutput:
    """loss = sum -sg(clip(r, low, high)) A l; d loss / d l = -A clip(r, low, high), never 0 by clipping.

    MiniMax-M1 2025, arXiv:2506.13585, section 3.1.
    """
    advantages = datum.required("advantages")
    ratio = _ratio(datum, config).detach()
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return _output(-clipped * advantages * datum.policy_logprobs, advantages, clipped != ratio)


def dro(datum: LossInput, config: LossConfig) -> LossOutput:
    """loss = sum -(l A - beta/2 (l - o)^2), both terms only where A != 0; d loss / d l = -(A - beta (l - o)).

    Direct Reward Optimisation, Richemond et al. 2024, arXiv:2405.19107.
    """
    advantages = datum.required("advantages")
    log_ratio = datum.policy_logprobs - datum.required("old_logprobs")
    beta = config["beta"]
    assert beta is not None
    losses = -(datum.policy_logprobs * advantages - 0.5 * beta * log_ratio.square())
    return _output(losses, advantages)


def gspo(datum: LossInput, config: LossConfig) -> LossOutput:
    """ppo with the sequence-level ratio s = exp(mean(l - o)), its gradient flowing through each token.

    log s_t = min(l_t - sg(l_t) + sg(mean(l - o)), cap), the mean over the positions with A != 0 (the wire has no other
    mask). d loss / d l_t = -A_t s, and 0 where the clip or the cap binds. Zheng et al. 2025, arXiv:2507.18071, the
    token-level form (GSPO-token).
    """
    advantages = datum.required("advantages")
    log_ratio = datum.policy_logprobs - datum.required("old_logprobs")
    is_loss_token = advantages != 0
    count = is_loss_token.sum().clamp(min=1)
    mean = torch.where(is_loss_token, log_ratio.detach(), 0.0).sum() / count
    log_ratio_sequence = log_ratio - log_ratio.detach() + mean
    ratio = log_ratio_sequence.clamp(max=config["seq_ratio_log_cap"]).exp()
    return _output(_clipped_surrogate(ratio, advantages, config), advantages, _binds(ratio, advantages, config))


def _ratio(datum: LossInput, config: LossConfig) -> Tensor:
    cap = config["ratio_log_cap"]
    assert cap is not None
    return (datum.policy_logprobs - datum.required("old_logprobs")).clamp(-cap, cap).exp()


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _binds(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    assert low is not None
    assert high is not None
    detached = ratio.detach()
    return ((advantages > 0) & (detached > high)) | ((advantages < 0) & (detached < low))


def _output(losses: Tensor, advantages: Tensor, binds: Tensor | None = None) -> LossOutput:
    """Sum over the loss tokens; the others may hold any logprobs, so they are selected away, not multiplied by 0."""
    is_loss_token = advantages != 0
    metrics = {} if binds is None else {"clipped_tokens:sum": float((binds & is_loss_token).sum())}
    return LossOutput(torch.where(is_loss_token, losses, 0.0).sum(), metrics)
