"""Counting rows once, dropping long ones by name, refusing invalid ones, and cutting batches."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cookbook.data import START, Renderer, SFTDataset
from cookbook.errors import DataError
from tests.data.conftest import chat, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERHEAD = (1 + 5 + 1 + 1) + (1 + 10 + 1 + 1)
"""Bytes and marks of the ChatML frame around one question and one answer."""


def rows_of_lengths(*lengths: int) -> list[object]:
    """Rows whose question and one-letter answer render to exactly so many tokens."""
    return [chat("q" * (length - OVERHEAD - 1), "a") if length else {} for length in lengths]


def prepare(path: Path, renderer: Renderer, cache_dir: Path, **options: int) -> SFTDataset:
    return SFTDataset.prepare(path, renderer, cache_dir=cache_dir, **({"max_seq_len": 64} | options))


def test_rows_are_counted_as_they_render(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30, 50, 64))
    dataset = prepare(path, renderer, tmp_path)
    assert dataset.lengths.tolist() == [len(row.tokens) for row in dataset.rows()] == [30, 50, 64]
    assert dataset.trained.tolist() == [2, 2, 2]


def test_rows_over_the_limit_are_dropped_and_named(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30, 65, 64, 99))
    dataset = prepare(path, renderer, tmp_path)
    assert dataset.kept.tolist() == [0, 2]
    assert dataset.dropped() == [(1, 65), (3, 99)]
    batches = list(dataset.batches(dataset.plan(batch_size=2, epochs=1, seed=0)))
    assert sorted(batches[0].ordinals) == [0, 2]


def test_a_limit_that_no_row_fits_is_an_error(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(40, 50))
    with pytest.raises(DataError, match="fits into max_seq_len=39: the shortest of 2 has 40 tokens"):
        prepare(path, renderer, tmp_path, max_seq_len=39)


def test_max_examples_takes_the_first_rows_and_reads_no_further(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", [*rows_of_lengths(30, 40), {"broken": 1}])
    dataset = prepare(path, renderer, tmp_path, max_examples=2)
    assert (dataset.num_rows, dataset.kept.tolist()) == (2, [0, 1])
    assert prepare(path, renderer, tmp_path, max_examples=1).kept.tolist() == [0]


def test_all_invalid_rows_are_counted_and_twenty_are_named(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", [chat("q", "a"), *[chat("q")] * 24, [1]])
    with pytest.raises(DataError) as caught:
        prepare(path, renderer, tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("25 of 26 rows of")
    assert lines[1].startswith("  - row 1 (d.jsonl, line 2) has no assistant message")
    assert len(lines) == 22
    assert lines[-1] == "  - and 5 more"
    assert not (tmp_path / "cache").exists()


def test_counts_are_made_once_and_found_again(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30, 40))
    prepare(path, renderer, tmp_path / "cache")
    [counts] = (tmp_path / "cache").iterdir()
    np.save(counts, np.array([[33, 44], [2, 2]], np.int32))  # shows which run counted
    assert prepare(path, renderer, tmp_path / "cache", max_seq_len=40).lengths.tolist() == [33, 44]
    counts.write_bytes(counts.read_bytes()[:-5])
    assert prepare(path, renderer, tmp_path / "cache").lengths.tolist() == [30, 40]


def test_counts_of_other_data_or_another_rendering_are_not_taken(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "d.jsonl", [chat("q", "a", "q", "a")])
    assert prepare(path, Renderer(tokenizer), tmp_path).trained.tolist() == [4]
    assert prepare(path, Renderer(tokenizer, "last_assistant_message"), tmp_path).trained.tolist() == [2]
    write_rows(path, [chat("q", "aaa", "q", "a")])
    assert prepare(path, Renderer(tokenizer), tmp_path).trained.tolist() == [6]


def test_a_cache_folder_that_cannot_be_written_is_an_error(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30))
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        prepare(path, renderer, path / "below-a-file")


def test_batches_go_on_where_the_last_one_says(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", [chat("q" * n, "a") for n in range(1, 8)])
    dataset = prepare(path, renderer, tmp_path)
    plan = dataset.plan(batch_size=3, epochs=2, seed=1)
    whole = list(dataset.batches(plan))
    assert [len(batch.rows) for batch in whole] == [3, 3, 1] * 2
    assert [(batch.epoch, batch.start, batch.stop) for batch in whole[:3]] == [(0, 0, 3), (0, 3, 6), (0, 6, 7)]
    for done, batch in enumerate(whole, 1):
        rest = [b.ordinals for b in dataset.batches(plan, batch.next)]
        assert rest == [b.ordinals for b in whole[done:]]
    first = whole[0]
    assert [len(row.tokens) for row in first.rows] == [int(dataset.lengths[ordinal]) for ordinal in first.ordinals]
    assert first.num_trained == 6


def test_data_that_changes_after_it_was_counted_is_an_error(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30, 40))
    dataset = prepare(path, renderer, tmp_path)
    write_rows(path, rows_of_lengths(30, 40, 50))
    with pytest.raises(DataError, match="changed while it was in use"):
        next(dataset.batches(dataset.plan(batch_size=1, epochs=1, seed=0), START))


def test_counting_reports_progress(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cookbook.data.counts.PROGRESS_ROWS", 2)
    path = write_rows(tmp_path / "d.jsonl", rows_of_lengths(30, 30, 30, 30, 30))
    calls: list[tuple[int, int]] = []
    SFTDataset.prepare(
        path, renderer, cache_dir=tmp_path, max_seq_len=64, progress=lambda done, rows: calls.append((done, rows))
    )
    assert calls == [(2, 5), (4, 5)]


def test_rows_are_not_held_in_memory(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", [chat("q", "a") | {"note": "x" * 6000}] * 2000)
    renderer.render(chat("warm", "up"), "row 0")
    tracemalloc.start()
    try:
        dataset = prepare(path, renderer, tmp_path, max_seq_len=64)
        for _ in itertools.islice(dataset.batches(dataset.plan(batch_size=8, epochs=1, seed=0)), 5):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 12e6
    assert peak < 3e6
