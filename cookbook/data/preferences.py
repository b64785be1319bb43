"""All that a run on pairs of answers reads: training pairs, held-out pairs, the order of the batches, a report.

Row forms and their checks: pairs.py. In which order rows are trained: epochs.py.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.config import PreferenceConfig
from cookbook.data.context import context_limit
from cookbook.data.counts import MAX_NAMED_ROWS, cached_counts
from cookbook.data.epochs import START, EpochPlan, Position
from cookbook.data.jsonl import JsonlFile
from cookbook.data.pairs import RenderedPair, render_pair
from cookbook.data.preference_preflight import PreferencePreflightReport, preference_preflight_report
from cookbook.data.rendering import Renderer
from cookbook.errors import ConfigError, DataError, ModelError, Problem
from cookbook.models import load_tokenizer

__all__ = ["PairBatch", "PreferenceData", "PreferenceDataset", "load_preference_data"]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """The pairs of one optimizer step: rows `start` to `stop` (exclusive) of the epoch's permutation."""

    epoch: int
    start: int
    stop: int
    ordinals: tuple[int, ...]
    """Row numbers in the data file, 0-based."""
    pairs: tuple[RenderedPair, ...] = field(repr=False)
    next: Position
    """Where training goes on once this batch is trained; what a checkpoint records."""

    @property
    def num_trained(self) -> int:
        """Response tokens of the batch, chosen and rejected."""
        return sum(pair.num_trained for pair in self.pairs)


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """The rows of a data file both of whose sides fit, with their counts. Made by `PreferenceDataset.prepare`."""

    file: JsonlFile
    renderer: Renderer
    max_seq_len: int
    lengths: NDArray[np.int64] = field(repr=False)
    """int64 (2, rows): tokens of the chosen and the rejected side of every row considered, dropped ones included."""
    trained: NDArray[np.int64] = field(repr=False)
    """int64 (2, rows): response tokens of the same."""
    digests: NDArray[np.int64] = field(repr=False)
    """int64 (rows,): the same for two rows exactly when their `RenderedPair.digest` is."""
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
        max_pairs: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PreferenceDataset:
        """Check and count every row of the file at `path`, or its first `max_pairs`.

        Rows of which a side is longer than `max_seq_len` tokens are dropped and can be named (`dropped`); no answer is
        cut. An invalid row is never dropped: it is an error. The counts are kept in `cache_dir`, under the data,
        tokenizer and renderer, so that a resumed run does not count again; `progress` gets (rows done, rows) every
        10,000 rows while counting.

        Raises:
            DataError: the file is missing or empty, rows are invalid (up to 20 are named, all are counted), or no row
                fits into `max_seq_len`.
        """
        file = JsonlFile.open(path)
        num_rows = len(file) if max_pairs is None else min(max_pairs, len(file))
        key = hashlib.sha256(f"pairs-1/{file.fingerprint}/{renderer.fingerprint}/{num_rows}".encode()).hexdigest()[:20]

        def count(ordinal: int, row: dict[str, Any]) -> tuple[int, ...]:
            pair = render_pair(row, renderer, file.where(ordinal))
            sides = (pair.chosen, pair.rejected)
            digest = int.from_bytes(bytes.fromhex(pair.digest), "little", signed=True)
            return *(len(side.tokens) for side in sides), *(side.num_trained for side in sides), digest

        counts = cached_counts(cache_dir / f"pairs-{key}.npy", file, count, (5, num_rows), np.int64, progress)
        longer = counts[:2].max(axis=0)
        kept = np.flatnonzero(longer <= max_seq_len)
        if len(kept) == 0:
            raise DataError(
                f"no row of {file.path} fits into max_seq_len={max_seq_len}: the longer side of the shortest of "
                f"{num_rows} has {int(longer.min())} tokens. Raise max_seq_len or shorten the rows."
            )
        return cls(file, renderer, max_seq_len, counts[:2], counts[2:4], counts[4], kept)

    @property
    def num_rows(self) -> int:
        """Rows considered: those of the file, or `max_pairs` of them."""
        return len(self.digests)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the data file's bytes and of which rows are kept."""
        return hashlib.sha256(self.file.fingerprint.encode() + self.kept.tobytes()).hexdigest()

    def dropped(self, limit: int = MAX_NAMED_ROWS) -> list[tuple[int, int]]:
        """The first `limit` dropped rows as (ordinal, tokens of the longer side)."""
        longer = self.lengths.max(axis=0)
        ordinals = np.flatnonzero(longer > self.max_seq_len)[:limit]
        return [(int(ordinal), int(longer[ordinal])) for ordinal in ordinals]

    def pair_digests(self) -> Iterator[str]:
        """`RenderedPair.digest` of the kept rows in file order, without rendering them."""
        return (int(value).to_bytes(8, "little", signed=True).hex() for value in self.digests[self.kept])

    def num_repeated(self) -> int:
        """Kept rows whose prompt and answers stood in an earlier kept row."""
        return len(self.kept) - len(np.unique(self.digests[self.kept]))

    def num_also_in(self, other: PreferenceDataset) -> int:
        """Kept rows whose prompt and answers are also one of the kept rows of `other`."""
        return int(np.isin(self.digests[self.kept], other.digests[other.kept]).sum())

    def render(self, ordinal: int) -> RenderedPair:
        """Row `ordinal` of the data file as tokens and weights.

        Raises:
            DataError: the file changed since it was counted.
        """
        return render_pair(self.file[ordinal], self.renderer, self.file.where(ordinal))

    def plan(self, *, batch_size: int, epochs: int, seed: int) -> EpochPlan:
        """The order in which the kept rows are trained."""
        return EpochPlan(num_rows=len(self.kept), batch_size=batch_size, epochs=epochs, seed=seed)

    def batches(self, plan: EpochPlan, start: Position = START) -> Iterator[PairBatch]:
        """The batches of `plan` from `start` to the end of the last epoch."""
        assert plan.num_rows == len(self.kept), "the plan was made for another data set"
        for part in plan.slices(start):
            ordinals = tuple(self.kept[part.indices].tolist())
            pairs = tuple(self.render(ordinal) for ordinal in ordinals)
            yield PairBatch(part.epoch, part.start, part.start + len(ordinals), ordinals, pairs, part.next)

    def rows(self) -> Iterator[RenderedPair]:
        """The kept rows in file order, rendered one by one; for evaluation."""
        return (self.render(int(ordinal)) for ordinal in self.kept)


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """The data of one run on pairs. Made by `load_preference_data`. Several threads may read it at once."""

    train: PreferenceDataset = field(repr=False)
    held_out: PreferenceDataset | None = field(repr=False)
    plan: EpochPlan
    report: PreferencePreflightReport = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Text that is the same for two data sets exactly when each row of an epoch can only be the same pair."""
        text = f"{self.train.fingerprint}/{self.train.renderer.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    def batches(self, start: Position) -> Iterator[PairBatch]:
        """Batches from `start` to the end of the last epoch."""
        return self.train.batches(self.plan, start)

    def held_out_pairs(self) -> Iterator[RenderedPair]:
        """Held-out pairs in file order; none without a held-out data set."""
        return self.held_out.rows() if self.held_out is not None else iter(())

    def digests(self) -> Iterator[str]:
        """`RenderedPair.digest` of every pair, held-out ones too."""
        held_out = self.held_out.pair_digests() if self.held_out is not None else iter(())
        return itertools.chain(self.train.pair_digests(), held_out)

    def reference_pairs(self, start: Position = START) -> Iterator[RenderedPair]:
        """Every pair once, in the order in which its reference logprobs are needed by a run that goes on at `start`.

        Held-out pairs, then training pairs from `start` to the end of its epoch, then the others of that epoch.
        """
        yield from self.held_out_pairs()
        epoch = min(start.epoch, self.plan.epochs - 1)
        row = start.row if epoch == start.epoch else 0
        order = self.train.kept[self.plan.permutation(epoch)]
        for ordinal in [*order[row:].tolist(), *order[:row].tolist()]:
            yield self.train.render(ordinal)


def load_preference_data(
    config: PreferenceConfig,
    models_dir: Path,
    cache_dir: Path,
    *,
    shape_context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreferenceData:
    """Read, check and count all rows that `config` names.

    Args:
        models_dir: folder of the models known by name.
        cache_dir: folder for the counts, so that a resumed run does not count again.
        shape_context: context length of the training shape in tokens, None on a manual launch.
        progress: gets (rows done, rows) now and then.

    Raises:
        ConfigError: the problems of the model, the training rows and the held-out rows, together.
    """
    renderer, limit = _renderer_and_limit(config, models_dir, shape_context)
    problems: list[Problem] = []

    def prepare(where: str, path: str, max_pairs: int | None) -> PreferenceDataset | None:
        try:
            return PreferenceDataset.prepare(
                path, renderer, cache_dir=cache_dir, max_seq_len=limit, max_pairs=max_pairs, progress=progress
            )
        except DataError as error:
            problems.append(Problem(where, str(error), ""))
            return None

    train = prepare("dataset", config.dataset, config.max_pairs)
    evaluation, held_out = config.evaluation, None
    if evaluation.dataset is not None:
        held_out = prepare("evaluation.dataset", evaluation.dataset, evaluation.max_pairs)
    if problems or train is None:
        raise ConfigError(problems)
    plan = train.plan(batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    report = preference_preflight_report(
        train, plan, dcp_save_interval=config.weight_sync.dcp_save_interval, held_out=held_out
    )
    return PreferenceData(train, held_out, plan, report)


def _renderer_and_limit(config: PreferenceConfig, models_dir: Path, shape_context: int | None) -> tuple[Renderer, int]:
    """The renderer, and the most tokens that a side of a row may have."""
    try:
        tokenizer = load_tokenizer(config.tokenizer_model or config.base_model, models_dir)
        renderer = Renderer(tokenizer, renderer_name=config.renderer_name)
        return renderer, context_limit(config, models_dir, shape_context)
    except ModelError as error:
        raise ConfigError([Problem("tokenizer_model or base_model", str(error), "")]) from error
    except DataError as error:
        raise ConfigError([Problem("renderer_name", str(error), "")]) from error
