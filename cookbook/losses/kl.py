"""Estimators of the KL divergence between the policy and the reference, with a gradient that moves the policy."""

from __future__ import annotations

from torch import Tensor

from cookbook.errors import ShapeError

__all__ = ["KL_ESTIMATORS", "kl_terms"]

KL_ESTIMATORS = ("k3", "k2")


def kl_terms(policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of the KL divergence, in nats, from tokens that the policy sampled. Never negative.

    With l the policy's and r the reference's log-probability of the sampled token:

    k3 = exp(r - l) - (r - l) - 1, unbiased; d k3 / d l = 1 - exp(r - l), in expectation the gradient of KL(ref || pi).
    k2 = (l - r)^2 / 2, biased; d k2 / d l = l - r, in expectation the gradient of KL(pi || ref), the reverse KL.

    Schulman 2020, http://joschu.net/blog/kl-approx.html. k1 = l - r is not offered: as a loss term its expected
    gradient is 0. The exponent is not clamped: behind a clamp the gradient of k3 would be 1 and push the policy away
    from the reference. In float64, as the training step uses it, k3 overflows only above 709 nats.

    Args:
        policy_logprobs: (N,), carries gradient.
        reference_logprobs: (N,), no gradient.
        estimator: k3 or k2.

    Raises:
        ShapeError: the shapes differ, or the estimator is unknown.
    """
    if policy_logprobs.shape != reference_logprobs.shape:
        raise ShapeError(
            f"reference_logprobs has shape {tuple(reference_logprobs.shape)}, policy_logprobs "
            f"{tuple(policy_logprobs.shape)}. Score the same tokens with both models."
        )
    if estimator not in KL_ESTIMATORS:
        raise ShapeError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}.")
    log_ratio = reference_logprobs.detach() - policy_logprobs
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.expm1() - log_ratio
