"""The account of an RL run's rows: each one is trained, rejected or pending, and all three add up. Records only.

A row is named by its ordinal over the whole run: epoch x rows + place in the epoch's permutation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from cookbook.errors import CheckpointError
from cookbook.rollouts.records import PromptGroup, RejectedRow

__all__ = ["CollectedStep", "RowLedger", "sampling_seed"]


def sampling_seed(run_seed: int, row: int, completion: int, turn: int = 0) -> int:
    """Seed of one sampling request, in [0, 2**31): the same at every attempt, another for every completion and turn."""
    text = f"{run_seed}/{row}/{completion}/{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class RowLedger:
    """How many rows are trained, rejected and pending, and which ones are pending.

    Rows are taken in order, but end in any order. So the pending ones are those from `next_row` on, and `open_rows`:
    rows below it that were taken and have not ended. A resumed run samples these first.

    >>> ledger = RowLedger(total=10).book(next_row=4, trained=[0, 3], rejected=[2])
    >>> ledger.open_rows, ledger.pending
    ((1,), 7)
    """

    total: int
    """Rows of the whole run: epochs x rows."""
    next_row: int = 0
    """Rows that were ever taken are below this one."""
    open_rows: tuple[int, ...] = field(default=(), repr=False)
    """Ascending."""
    trained: int = 0
    rejected: int = 0

    def __post_init__(self) -> None:
        self.check()

    @property
    def pending(self) -> int:
        """Rows that are neither trained nor rejected."""
        return len(self.open_rows) + self.total - self.next_row

    def is_pending(self, row: int) -> bool:
        """Whether a row is neither trained nor rejected."""
        return self.next_row <= row < self.total or row in self.open_rows

    def check(self) -> None:
        """Check that trained + rejected + pending = all rows.

        Raises:
            CheckpointError: they are not, or a row is pending twice; the numbers are in the error.
        """
        ascending = all(left < right for left, right in zip(self.open_rows, self.open_rows[1:], strict=False))
        inside = all(0 <= row < self.next_row for row in self.open_rows) and 0 <= self.next_row <= self.total
        adds_up = self.trained + self.rejected + self.pending == self.total
        if not (ascending and inside and adds_up and self.trained >= 0 and self.rejected >= 0):
            raise CheckpointError(
                f"the row ledger does not add up: {self.trained} trained + {self.rejected} rejected + {self.pending} "
                f"pending, of {self.total} rows (next row {self.next_row}, {len(self.open_rows)} open: "
                f"{list(self.open_rows)[:10]}). Rows would be trained twice or never. Resume from another checkpoint."
            )

    def book(self, *, next_row: int, trained: Iterable[int], rejected: Iterable[int]) -> RowLedger:
        """The ledger after these rows have ended, and all rows below `next_row` have been taken.

        Raises:
            CheckpointError: a row has ended before, is booked twice, or was never taken.
        """
        done_trained, done_rejected = list(trained), list(rejected)
        ended = set(done_trained) | set(done_rejected)
        taken = {*self.open_rows, *range(self.next_row, next_row)}
        if len(ended) != len(done_trained) + len(done_rejected) or not ended <= taken:
            twice = sorted(row for row in ended if (done_trained + done_rejected).count(row) > 1 or row not in taken)
            raise CheckpointError(
                f"rows {twice[:10]} cannot be booked: each ended before, was given twice or was never taken "
                f"(next row {next_row})."
            )
        return RowLedger(
            total=self.total,
            next_row=max(next_row, self.next_row),
            open_rows=tuple(sorted(taken - ended)),
            trained=self.trained + len(done_trained),
            rejected=self.rejected + len(done_rejected),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON data, for the commit row."""
        return {
            "total": self.total,
            "next_row": self.next_row,
            "open_rows": list(self.open_rows),
            "trained": self.trained,
            "rejected": self.rejected,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a record back, and check it. Unknown keys are ignored, so that later versions may add some.

        Raises:
            CheckpointError: a key is missing or not a whole number, or the account does not add up.
        """
        numbers = {name: values.get(name) for name in ("total", "next_row", "trained", "rejected")}
        open_rows = values.get("open_rows")
        entries = [*numbers.values(), *(open_rows if isinstance(open_rows, list) else [None])]
        if any(isinstance(entry, bool) or not isinstance(entry, int) for entry in entries):
            raise CheckpointError(
                f"a row ledger needs total, next_row, trained and rejected as whole numbers and open_rows as a list of "
                f"them, got {dict(values)!r:.200}. Resume from another checkpoint, or start in a new log_path."
            )
        return cls(**numbers, open_rows=tuple(open_rows or ()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CollectedStep:
    """What one optimizer step is trained on, and what the rows of it come to once it is."""

    groups: tuple[PromptGroup, ...]
    """Accepted, in row order. Fewer than prompt_groups_per_step, or none, only at the end of the data."""
    rejected: tuple[RejectedRow, ...]
    """Rows that have been given up since the last step, in row order."""
    ledger: RowLedger
    """The account with this step in it: commit it with the weights that the step gives, not before."""
    version: str
    """Snapshot that served all groups; "" = the base model as it was deployed."""

    def follows(self, before: RowLedger) -> bool:
        """Whether `before` and what this step books make `ledger`: a recorded step may be trained again then."""
        rows = [group.row for group in self.groups], [row.row for row in self.rejected]
        try:
            return before.book(next_row=self.ledger.next_row, trained=rows[0], rejected=rows[1]) == self.ledger
        except CheckpointError:
            return False
