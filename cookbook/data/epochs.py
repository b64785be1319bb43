"""The order of rows: a seeded shuffle for each epoch, cut into batches, that can be entered at any recorded position.

Knows numbers of rows only, not rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cookbook.errors import DataError

__all__ = ["START", "EpochPlan", "Position", "Slice"]


@dataclass(frozen=True, order=True)
class Position:
    """The next row to train: place `row` of the permutation of `epoch`, both 0-based."""

    epoch: int
    row: int


START = Position(0, 0)


@dataclass(frozen=True, eq=False)
class Slice:
    """Places `start` to `start + len(indices)` of the permutation of `epoch`."""

    epoch: int
    start: int
    indices: NDArray[np.int64] = field(repr=False)
    """int64 (rows of the batch,), each below the plan's `num_rows`."""
    next: Position


@dataclass(frozen=True)
class EpochPlan:
    """Batches over `epochs` passes of `num_rows` rows; the last batch of an epoch may be short.

    The permutation of an epoch follows from (seed, epoch) alone. A run can therefore go on from a recorded position
    with another batch size, and every row is still trained once an epoch.
    """

    num_rows: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass."""
        return -(-self.num_rows // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all passes."""
        return self.steps_per_epoch * self.epochs

    def steps_left(self, start: Position) -> int:
        """Optimizer steps from `start` to the end.

        Raises:
            DataError: `start` lies outside the data.
        """
        start = self._checked(start)
        if start.epoch == self.epochs:
            return 0
        return (
            -(-(self.num_rows - start.row) // self.batch_size) + (self.epochs - start.epoch - 1) * self.steps_per_epoch
        )

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """int64 (num_rows,): the rows in the order of `epoch`."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def slices(self, start: Position = START) -> Iterator[Slice]:
        """The batches from `start` to the end of the last epoch.

        Raises:
            DataError: `start` lies outside the data.
        """
        start = self._checked(start)
        for epoch in range(start.epoch, self.epochs):
            order = self.permutation(epoch)
            for row in range(start.row if epoch == start.epoch else 0, self.num_rows, self.batch_size):
                stop = min(row + self.batch_size, self.num_rows)
                following = Position(epoch, stop) if stop < self.num_rows else Position(epoch + 1, 0)
                yield Slice(epoch, row, order[row:stop], following)

    def _checked(self, start: Position) -> Position:
        """The same place, with the end of an epoch written as the start of the next."""
        if start.row == self.num_rows:
            start = Position(start.epoch + 1, 0)
        inside = 0 <= start.row < self.num_rows and 0 <= start.epoch < self.epochs
        if not inside and start != Position(self.epochs, 0):
            raise DataError(
                f"position epoch {start.epoch}, row {start.row} lies outside {self.epochs} epochs of {self.num_rows} "
                "rows: the data set or epochs changed. Go on with the data the run began with, or start a new run."
            )
        return start
