"""Means over rows with bootstrap intervals: how much a number would move with other rows of the same kind.

The percentile bootstrap of Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Rows are what is
drawn: the answers to one row belong together, and so do the two models' answers to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.errors import ShapeError

__all__ = ["Bootstrap", "Estimate"]

_DRAWN_AT_ONCE = 1 << 20  # row numbers in memory


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, and the interval that holds the chosen share of its resamples."""

    value: float
    low: float | None
    """None = one row alone says nothing about others."""
    high: float | None
    num_rows: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high, "num_rows": self.num_rows}


@dataclass(frozen=True)
class Bootstrap:
    """Resamples rows. The same seed and number of rows give the same resamples, so that two models meet the same ones.

    >>> Bootstrap(samples=2000, confidence=0.95, seed=0).mean([1.0, 1.0, 1.0])
    Estimate(value=1.0, low=1.0, high=1.0, num_rows=3)
    """

    samples: int
    """Resamples behind an interval."""
    confidence: float
    """Share of the resamples that an interval holds, in (0, 1); half of the rest lies on either side."""
    seed: int

    def mean(self, values: Any, weights: Any = None, *, minus: tuple[Any, Any] | None = None) -> Estimate:
        """sum(values) / sum(weights) over rows; with `minus`, its difference to that of another model on the same rows.

        Args:
            values: (R,), a sum for each row: of nats, or one number.
            weights: (R,), what each row counts, >= 0: its tokens. None = 1 each, for a plain mean.
            minus: the other model's (values, weights), row by row. Both are resampled together: the rows that both
                find hard cancel.

        Raises:
            ShapeError: no rows, or lengths that differ.
        """
        columns = [*_pair(values, weights), *(_pair(*minus) if minus is not None else [])]
        count = len(columns[0])
        if count == 0 or any(len(column) != count for column in columns):
            raise ShapeError(
                f"columns of {[len(column) for column in columns]} rows. All need the same rows, at least 1."
            )
        sums = np.stack([column.sum() for column in columns])
        value = float(_statistic(sums[:, None])[0])
        if count == 1:
            return Estimate(value, None, None, 1)
        tail = 100.0 * (1.0 - self.confidence) / 2.0
        low, high = np.percentile(self._resampled(np.stack(columns)), [tail, 100.0 - tail])
        return Estimate(value, float(low), float(high), count)

    def _resampled(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The statistic of every resample, (samples,). `columns` is (C, R)."""
        generator = np.random.default_rng(self.seed)
        count = columns.shape[1]
        found, done = np.empty(self.samples), 0
        while done < self.samples:
            size = min(self.samples - done, max(1, _DRAWN_AT_ONCE // count))
            drawn = generator.integers(count, size=(size, count))
            found[done : done + size] = _statistic(np.stack([column[drawn].sum(axis=1) for column in columns]))
            done += size
        return found


def _pair(values: Any, weights: Any) -> list[NDArray[np.float64]]:
    numbers = np.asarray(values, np.float64)
    return [numbers, np.ones(len(numbers)) if weights is None else np.asarray(weights, np.float64)]


def _statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ratio of sums, less the other model's: (2 or 4, S) -> (S,)."""
    ratio: NDArray[np.float64] = sums[0] / sums[1]
    return ratio if len(sums) == 2 else ratio - sums[2] / sums[3]
