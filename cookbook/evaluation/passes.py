"""pass@k: the chance that at least one of k answers is right."""

from __future__ import annotations

from cookbook.errors import ShapeError

__all__ = ["pass_at"]


def pass_at(k: int, num_answers: int, num_right: int) -> float:
    """Unbiased estimate of pass@k for one row: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, arXiv:2107.03374, equation 1, as the product that does not overflow. 1 - (1 - c/n)^k would be too
    low.

    Args:
        k: answers that are looked at, 1 <= k <= n.
        num_answers: n, answers that were sampled.
        num_right: c, those that are right.

    Raises:
        ShapeError: the numbers do not fit together.

    >>> pass_at(2, 4, 1)  # of the 6 pairs of answers, 3 hold the right one
    0.5
    """
    if not 1 <= k <= num_answers or not 0 <= num_right <= num_answers:
        raise ShapeError(
            f"pass@{k} of {num_answers} answers, {num_right} right: needs 1 <= k <= answers >= right >= 0."
        )
    num_wrong = num_answers - num_right
    if num_wrong < k:
        return 1.0
    all_wrong = 1.0
    for drawn in range(k):
        all_wrong *= (num_wrong - drawn) / (num_answers - drawn)
    return 1.0 - all_wrong
