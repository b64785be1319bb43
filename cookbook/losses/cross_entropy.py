"""Weighted cross-entropy: the kernel of supervised training and of every loss that a client evaluates itself."""

from __future__ import annotations

from cookbook.losses.records import LossConfig, LossInput, LossOutput

__all__ = ["cross_entropy"]


def cross_entropy(datum: LossInput, config: LossConfig) -> LossOutput:
    """Raw weighted sum of negative log-probabilities.

    loss = sum_t -w_t * logp_t, so that d loss / d logp_t = -w_t exactly. Weights are real numbers: a client that
    evaluates its own loss C sends w = -dC/dlogp, so they are neither clamped, binarised nor normalised here.

    Raises:
        ShapeError: weights are missing or of another shape than the targets.
    """
    weights = datum.required("weights")
    return LossOutput(-(weights * datum.policy_logprobs).sum())
