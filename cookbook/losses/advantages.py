"""Advantages: what each completion of a prompt group was worth, relative to the others of that group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cookbook.errors import ShapeError

__all__ = ["ADVANTAGE_MODES", "advantages"]

ADVANTAGE_MODES = ("group_std", "group_mean", "leave_one_out")
_EPS = 1e-8


def advantages(rewards: Sequence[float], mode: str) -> tuple[float, ...]:
    """One advantage a completion, relative to its prompt group.

    group_std:      A_i = (R_i - mean) / (std + 1e-8), std with ddof 1. GRPO, Shao et al. 2024, arXiv:2402.03300, 4.1.2.
    group_mean:     A_i = R_i - mean. Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2.
    leave_one_out:  A_i = R_i - mean of the others = G / (G - 1) (R_i - mean). RLOO, Ahmadian et al. 2024,
                    arXiv:2402.14740, equation 8.

    Equal rewards give advantages of exactly 0.0 in every mode, so that no rounding error becomes a training signal.

    Raises:
        ShapeError: fewer than 2 rewards, one that is not finite, or an unknown mode.

    >>> advantages([1.0, 0.0, 0.0, 0.0], "leave_one_out")
    (1.0, -0.3333333333333333, -0.3333333333333333, -0.3333333333333333)
    """
    if mode not in ADVANTAGE_MODES:
        raise ShapeError(f"advantage must be one of {', '.join(ADVANTAGE_MODES)}, got {mode!r}.")
    count = len(rewards)
    if count < 2:
        raise ShapeError(f"a prompt group needs at least 2 completions, got {count}: a group of one has advantage 0.")
    if not all(math.isfinite(reward) for reward in rewards):
        raise ShapeError(f"rewards must be finite numbers, got {list(rewards)}.")
    if min(rewards) == max(rewards):
        return (0.0,) * count
    mean = math.fsum(rewards) / count
    centred = [reward - mean for reward in rewards]
    if mode == "group_mean":
        scale = 1.0
    elif mode == "leave_one_out":
        scale = count / (count - 1)
    else:
        std = math.sqrt(math.fsum(value * value for value in centred) / (count - 1))
        scale = 1.0 / (std + _EPS)
    return tuple(value * scale for value in centred)
