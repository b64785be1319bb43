"""A training set of chat rows: counted once over all rows, rendered again batch by batch, never held in memory.

In which order rows are trained: epochs.py. What the counts mean for a run: preflight.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.data.counts import MAX_NAMED_ROWS, cached_counts
from cookbook.data.epochs import START, EpochPlan, Position
from cookbook.data.jsonl import JsonlFile
from cookbook.data.rendering import RenderedRow, Renderer
from cookbook.errors import DataError

__all__ = ["Batch", "SFTDataset"]


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one optimizer step: rows `start` to `stop` (exclusive) of the epoch's permutation."""

    epoch: int
    start: int
    stop: int
    ordinals: tuple[int, ...]
    """Row numbers in the data file, 0-based."""
    rows: tuple[RenderedRow, ...] = field(repr=False)
    next: Position
    """Where training goes on once this batch is trained; what a checkpoint records."""

    @property
    def num_trained(self) -> int:
        """Trained tokens of the batch."""
        return sum(row.num_trained for row in self.rows)


@dataclass(frozen=True, eq=False)
class SFTDataset:
    """The rows of a data file that fit, with their token counts. Made by `SFTDataset.prepare`."""

    file: JsonlFile
    renderer: Renderer
    max_seq_len: int
    lengths: NDArray[np.int32] = field(repr=False)
    """int32 (rows,): tokens of every row that was considered, dropped ones included."""
    trained: NDArray[np.int32] = field(repr=False)
    """int32 (rows,): trained tokens of the same rows."""
    kept: NDArray[np.int64] = field(repr=False)
    """int64 (kept rows,): ordinals of the rows that fit, in file order."""

    @classmethod
    def prepare(
        cls,
        path: str | Path,
        renderer: Renderer,
        *,
        cache_dir: Path,
        max_seq_len: int,
        max_examples: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SFTDataset:
        """Check and count every row of the file at `path`, or its first `max_examples`.

        Rows longer than `max_seq_len` tokens are dropped and can be named (`dropped`). An invalid row is never
        dropped: it is an error. The counts are kept in `cache_dir`, under the data, tokenizer and renderer, so that a
        resumed run does not count again; `progress` gets (rows done, rows) every 10,000 rows while counting.

        Raises:
            DataError: the file is missing or empty, rows are invalid (up to 20 are named, all are counted), or no row
                fits into `max_seq_len`.
        """
        file = JsonlFile.open(path)
        num_rows = len(file) if max_examples is None else min(max_examples, len(file))
        key = hashlib.sha256(f"{file.fingerprint}/{renderer.fingerprint}/{num_rows}".encode()).hexdigest()[:20]

        def count(ordinal: int, row: dict[str, Any]) -> tuple[int, int]:
            rendered = renderer.render(row, file.where(ordinal))
            return len(rendered.tokens), rendered.num_trained

        counts = cached_counts(cache_dir / f"rows-{key}.npy", file, count, (2, num_rows), np.int32, progress)
        kept = np.flatnonzero(counts[0] <= max_seq_len)
        if len(kept) == 0:
            raise DataError(
                f"no row of {file.path} fits into max_seq_len={max_seq_len}: the shortest of {num_rows} has "
                f"{int(counts[0].min())} tokens. Raise max_seq_len or shorten the rows."
            )
        return cls(file, renderer, max_seq_len, counts[0], counts[1], kept)

    @property
    def num_rows(self) -> int:
        """Rows considered: those of the file, or `max_examples` of them."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the data file's bytes."""
        return self.file.fingerprint

    def dropped(self, limit: int = MAX_NAMED_ROWS) -> list[tuple[int, int]]:
        """The first `limit` dropped rows as (ordinal, tokens)."""
        ordinals = np.flatnonzero(self.lengths > self.max_seq_len)[:limit]
        return [(int(ordinal), int(self.lengths[ordinal])) for ordinal in ordinals]

    def render(self, ordinal: int) -> RenderedRow:
        """Row `ordinal` of the data file as tokens and weights.

        Raises:
            DataError: the file changed since it was counted.
        """
        return self.renderer.render(self.file[ordinal], self.file.where(ordinal))

    def plan(self, *, batch_size: int, epochs: int, seed: int) -> EpochPlan:
        """The order in which the kept rows are trained."""
        return EpochPlan(num_rows=len(self.kept), batch_size=batch_size, epochs=epochs, seed=seed)

    def batches(self, plan: EpochPlan, start: Position = START) -> Iterator[Batch]:
        """The batches of `plan` from `start` to the end of the last epoch."""
        assert plan.num_rows == len(self.kept), "the plan was made for another data set"
        for part in plan.slices(start):
            ordinals = tuple(self.kept[part.indices].tolist())
            rows = tuple(self.render(ordinal) for ordinal in ordinals)
            yield Batch(part.epoch, part.start, part.start + len(ordinals), ordinals, rows, part.next)

    def rows(self) -> Iterator[RenderedRow]:
        """The kept rows in file order, rendered one by one; for evaluation."""
        return (self.render(int(ordinal)) for ordinal in self.kept)
