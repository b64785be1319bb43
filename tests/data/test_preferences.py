"""The data of a run on pairs: counted once, long ones dropped by name, batches from any position, a report."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cookbook.config import DPOConfig, ORPOConfig
from cookbook.data import START, Position, RenderedPair, Renderer
from cookbook.data.preferences import PreferenceData, PreferenceDataset, load_preference_data
from cookbook.errors import ConfigError, DataError
from tests.data.conftest import chat, write_rows
from tests.data.test_dataset import OVERHEAD
from tests.data.test_pairs import pair
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REAL_ROWS = Path(__file__).parents[3] / "shared" / "data" / "ifeval_preferences.jsonl"


def sized(question: int, chosen: int, rejected: int) -> dict[str, Any]:
    """A pair whose question and answers have so many letters; a side has OVERHEAD more tokens."""
    return pair(["q" * question], ["a" * chosen], ["b" * rejected])


def prepare(path: Path, renderer: Renderer, cache_dir: Path, **options: int) -> PreferenceDataset:
    return PreferenceDataset.prepare(path, renderer, cache_dir=cache_dir, **({"max_seq_len": 64} | options))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Fields of a config over seven pairs with answers of 2 and 1 letters."""
    rows = write_rows(tmp_path / "pairs.jsonl", [sized(n, 2, 1) for n in range(1, 8)])
    fields = {"log_path": str(tmp_path / "run"), "base_model": str(model), "dataset": str(rows), "lora_rank": 4}
    return {**fields, "batch_size": 3, "weight_sync": {"dcp_save_interval": 1}}


def load(fields: dict[str, Any], tmp_path: Path) -> PreferenceData:
    return load_preference_data(DPOConfig(**fields), tmp_path / "models", tmp_path / "cache")


def problems(fields: dict[str, Any], tmp_path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(fields, tmp_path)
    return [str(problem) for problem in caught.value.problems]


# The data set ------------------------------------------------------------------------------------------------------


def test_both_sides_are_counted_as_they_render(tmp_path: Path, renderer: Renderer) -> None:
    dataset = prepare(write_rows(tmp_path / "d.jsonl", [sized(1, 2, 3), sized(4, 9, 1)]), renderer, tmp_path)
    assert dataset.lengths.tolist() == [[OVERHEAD + 3, OVERHEAD + 13], [OVERHEAD + 4, OVERHEAD + 5]]
    assert dataset.trained.tolist() == [[3, 10], [4, 2]]
    rendered = list(dataset.rows())
    assert [[len(p.chosen.tokens), len(p.rejected.tokens)] for p in rendered] == dataset.lengths.T.tolist()
    digests = [int.from_bytes(bytes.fromhex(p.digest), "little", signed=True) for p in rendered]
    assert dataset.digests.tolist() == digests


def test_a_pair_of_which_either_side_is_too_long_is_dropped_and_named(tmp_path: Path, renderer: Renderer) -> None:
    room = 64 - OVERHEAD - 1
    rows = [sized(1, room, 1), sized(1, room + 1, 1), sized(1, 1, room), sized(1, 1, room + 7)]
    dataset = prepare(write_rows(tmp_path / "d.jsonl", rows), renderer, tmp_path)
    assert dataset.kept.tolist() == [0, 2]
    assert dataset.dropped() == [(1, 65), (3, 71)]
    with pytest.raises(DataError, match="fits into max_seq_len=30: the longer side of the shortest of 4 has 64 tokens"):
        prepare(dataset.file.path, renderer, tmp_path, max_seq_len=30)


def test_all_invalid_rows_are_named_at_once_with_row_and_line(tmp_path: Path, renderer: Renderer) -> None:
    rows = [sized(1, 1, 1), {}, pair(["q"], ["a"], ["a"]), [1], pair(["q"], [], ["a"]), *[chat("q", "a")] * 18]
    with pytest.raises(DataError) as caught:
        prepare(write_rows(tmp_path / "d.jsonl", rows), renderer, tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith("22 of 23 rows of")
    assert "  - row 1 (d.jsonl, line 2) is not a pair of answers" in text
    assert "  - row 2 (d.jsonl, line 3): chosen and rejected are equal answers" in text
    assert "  - row 3 (d.jsonl, line 4) is an array" in text
    assert "  - row 4 (d.jsonl, line 5): chosen has no answer" in text
    assert text.endswith("  - and 2 more")
    assert not (tmp_path / "cache").exists()


def test_counts_are_made_once_and_max_pairs_reads_no_further(tmp_path: Path, renderer: Renderer) -> None:
    path = write_rows(tmp_path / "d.jsonl", [sized(1, 2, 1), sized(2, 2, 1), {}])
    assert prepare(path, renderer, tmp_path / "cache", max_pairs=2).num_rows == 2
    [counts] = (tmp_path / "cache").iterdir()
    np.save(counts, np.array([[33, 44], [9, 9], [2, 2], [2, 2], [5, 5]], np.int64))  # shows which run counted
    again = prepare(path, renderer, tmp_path / "cache", max_pairs=2, max_seq_len=40)
    assert (again.lengths[0].tolist(), again.num_repeated(), again.kept.tolist()) == ([33, 44], 0, [0])


def test_batches_go_on_where_the_last_one_says(config: dict[str, Any], tmp_path: Path) -> None:
    data = load({**config, "epochs": 2, "seed": 1}, tmp_path)
    whole = list(data.batches(START))
    assert [len(batch.pairs) for batch in whole] == [3, 3, 1] * 2
    assert sorted(ordinal for batch in whole[:3] for ordinal in batch.ordinals) == list(range(7))
    for done, batch in enumerate(whole, 1):
        assert [b.ordinals for b in data.batches(batch.next)] == [b.ordinals for b in whole[done:]]
    assert [p.digest for p in whole[0].pairs] == [data.train.render(ordinal).digest for ordinal in whole[0].ordinals]
    assert whole[0].num_trained == 3 * (3 + 2)


def test_reference_pairs_are_each_once_held_out_first_then_as_training_meets_them(
    config: dict[str, Any], tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "held.jsonl", [sized(9, 1, 1), sized(10, 1, 1)])
    data = load({**config, "epochs": 2, "evaluation": {"dataset": str(held_out)}}, tmp_path)
    held = [p.digest for p in data.held_out_pairs()]
    for position in (START, Position(0, 3), Position(1, 6), Position(2, 0)):
        digests = [p.digest for p in data.reference_pairs(position)]
        assert digests[:2] == held
        assert len(set(digests)) == len(digests) == 9
        ahead = [p.digest for batch in data.batches(position) if batch.epoch == position.epoch for p in batch.pairs]
        assert digests[2 : 2 + len(ahead)] == ahead


def test_the_fingerprint_changes_with_what_can_be_trained_and_with_nothing_else(
    config: dict[str, Any], tmp_path: Path
) -> None:
    first = load(config, tmp_path).fingerprint
    assert load({**config, "seed": 9, "batch_size": 2, "epochs": 3}, tmp_path).fingerprint == first
    assert load({**config, "max_seq_len": OVERHEAD + 7}, tmp_path).fingerprint != first
    write_rows(Path(config["dataset"]), [sized(n, 1, 2) for n in range(1, 8)])
    assert load(config, tmp_path).fingerprint != first


def test_two_threads_read_the_same_pairs(config: dict[str, Any], tmp_path: Path) -> None:
    data = load(config, tmp_path)
    expected = [p.digest for p in data.reference_pairs()]
    found: list[list[str]] = []

    def read() -> None:
        for _ in range(10):
            found.append([p.digest for p in data.reference_pairs()])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 30


# Loading -----------------------------------------------------------------------------------------------------------


def test_the_problems_of_both_files_come_together(config: dict[str, Any], tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [chat("q", "a")])
    found = problems({**config, "dataset": str(bad), "evaluation": {"dataset": str(tmp_path / "no")}}, tmp_path)
    assert [text.split(":")[0] for text in found] == ["dataset", "evaluation.dataset"]
    assert "row 0 (bad.jsonl, line 1) is not a pair" in found[0]
    assert "does not exist" in found[1]


def test_an_unknown_renderer_and_a_missing_model_are_config_errors(config: dict[str, Any], tmp_path: Path) -> None:
    [text] = problems({**config, "renderer_name": "llama3"}, tmp_path)
    assert text.startswith("renderer_name: renderer_name 'llama3' is unknown")
    [text] = problems({**config, "base_model": "absent"}, tmp_path)
    assert text.startswith("tokenizer_model or base_model:")


def test_orpo_reads_the_same_pairs_within_the_shape_s_context(config: dict[str, Any], tmp_path: Path) -> None:
    orpo = ORPOConfig(**config | {"max_pairs": 5})
    data = load_preference_data(orpo, tmp_path / "models", tmp_path / "cache", shape_context=OVERHEAD + 5)
    assert (data.train.num_rows, data.train.kept.tolist()) == (5, [0, 1, 2])


# The report --------------------------------------------------------------------------------------------------------


def test_the_report_s_numbers_are_those_worked_out_by_hand(config: dict[str, Any], tmp_path: Path) -> None:
    report = load({**config, "epochs": 2, "max_seq_len": OVERHEAD + 8}, tmp_path).report
    assert (report.rows, report.kept, report.dropped) == (7, 6, {f"with a side longer than {OVERHEAD + 8} tokens": 1})
    assert report.dropped_examples == ((6, OVERHEAD + 9),)
    assert (report.chosen_tokens.max, report.rejected_tokens.max, report.length_ratio) == (3, 2, 1.5)
    assert report.longest_tokens == OVERHEAD + 8
    assert report.tokens_per_epoch == sum(2 * OVERHEAD + 2 * n + 3 for n in range(1, 7))
    assert (report.trained_tokens_per_epoch, report.trained_tokens) == (30, 60)
    assert (report.steps_per_epoch, report.total_steps, report.resume_points) == (2, 4, 4)
    text = report.to_text()
    assert "pairs            7 read, 6 kept, 1 dropped" in text
    assert "length ratio     1.50 median, chosen to rejected" in text
    assert "steps            4 = 2 epochs x 2 (batches of 3)" in text
    assert [warning.split(":")[0] for warning in report.warnings] == ["14% of the rows are dropped"]
    assert "| evaluation | none |" in report.to_markdown()
    assert json.loads(json.dumps(report.to_dict()))["chosen_tokens"]["p50"] == 3


def test_warnings_say_what_will_not_work(config: dict[str, Any], tmp_path: Path) -> None:
    assert load(config, tmp_path).report.warnings == ()
    rows = write_rows(tmp_path / "long.jsonl", [sized(1, 9, 1), sized(1, 9, 1), sized(2, 9, 1)])
    held_out = write_rows(tmp_path / "held.jsonl", [sized(2, 9, 1), sized(3, 9, 1), sized(500, 1, 1)])
    fields = {"dataset": str(rows), "evaluation": {"dataset": str(held_out)}, "weight_sync": {}, "batch_size": 4}
    assert load(config | fields, tmp_path).report.warnings == (
        "a run that dies starts over: set weight_sync.dcp_save_interval to save resume points.",
        "batch_size 4 is above the 3 rows: one step is one epoch.",
        "1 of 3 pairs stand in the data more than once, prompt and answers: they count more often.",
        "the chosen answers are 5.0 times as long as the rejected ones (median): the model may learn to write long "
        "answers instead of better ones.",
        "1 of 2 held-out pairs are training pairs: the numbers will not show what was learned.",
        "1 held-out pair left out: a side is too long.",
    )


# Real rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_ROWS.exists(), reason="ifeval_preferences.jsonl is not beside the checkout")
def test_real_pairs_render_with_a_shared_prompt_and_their_whole_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = prepare(REAL_ROWS, Renderer(tokenizer), tmp_path, max_seq_len=1 << 20)
    assert len(dataset.kept) == 100
    assert dataset.num_repeated() == 0
    pairs: list[RenderedPair] = list(dataset.rows())
    for ordinal, rendered in enumerate(pairs):
        row, length = dataset.file[ordinal], rendered.prompt_tokens
        assert np.array_equal(rendered.chosen.tokens[:length], rendered.rejected.tokens[:length])
        for side, name in ((rendered.chosen, "chosen"), (rendered.rejected, "rejected")):
            answer = row[name]["messages"][-1]["content"]
            assert tokenizer.decode(side.tokens[side.weights != 0].tolist()) == f"{answer}<|im_end|>"
            assert not side.weights[:length].any()
