"""Rewards in worker processes: math-verify, reasoning-gym and regular expressions, on texts that hang them too."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from cookbook.errors import DataError, RewardError
from cookbook.rewards import LoadedReward, Reward, load_reward, score
from cookbook.rewards.isolation import Late, call_isolated
from cookbook.rewards.reasoning import make_rows, parse_spec


def scored(reward: LoadedReward, text: str, row: dict[str, object]) -> Reward:
    return asyncio.run(score(reward, text, row, 30.0))


MATH = load_reward("math")
HANGS = load_reward("format:^(a+)+$", timeout_s=0.5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So it is \\boxed{33\\frac{1}{3}}.", 1.0),
        ("<think>\\boxed{5}</think> $\\frac{200}{6}$", 1.0),
        ("<answer>100/3</answer>", 1.0),
        ("<answer>$100/3$</answer>", 1.0),
        ("\\boxed{33}", 0.0),
        ("", 0.0),
        ("\\boxed{\\frac{", 0.0),
    ],
)
def test_math_compares_as_mathematics(text: str, value: float) -> None:
    assert scored(MATH, text, {"ground_truth": "\\dfrac{100}{3}"}).value == value


def test_words_in_a_box_are_compared_as_they_are() -> None:
    assert scored(MATH, "\\boxed{No}", {"ground_truth": "No"}).value == 1.0
    assert scored(MATH, "\\boxed{Yes}", {"ground_truth": "No"}).value == 0.0


def test_math_names_a_row_that_nothing_can_equal() -> None:
    assert MATH.check is not None
    assert MATH.check({"ground_truth": "$\\frac{1}{2}$"}) is None
    assert "math-verify cannot read: '$$'" in str(MATH.check({"ground_truth": "$$"}))
    assert "keys: ['truth']" in str(MATH.check({"truth": "1"}))


def test_a_text_that_hangs_or_fills_memory_gets_0_and_the_next_is_scored() -> None:
    started = time.monotonic()
    late = scored(load_reward("math", timeout_s=1.0), "\\boxed{9^{9^{9^{9}}}}", {"ground_truth": "1"})
    assert (late.value, late.parts["late"]) == (0.0, 1.0)
    assert scored(HANGS, "a" * 60 + "!", {}) == Reward(0.0, {"late": 1.0})
    assert time.monotonic() - started < 60
    assert scored(HANGS, "aaa", {}) == Reward(1.0)


def test_many_scores_at_once_do_not_mix() -> None:
    reward = load_reward("format:^7$", timeout_s=30.0)

    async def run() -> list[float]:
        return [r.value for r in await asyncio.gather(*(score(reward, str(i), {}, 30.0) for i in range(40)))]

    assert asyncio.run(run()) == [float(i == 7) for i in range(40)]


def test_the_default_format_wants_reasoning_then_an_answer_and_nothing_else() -> None:
    reward = load_reward("format")
    assert scored(reward, "<think>a\nb</think>\n<answer>c</answer>\n", {}).value == 1.0
    assert scored(reward, "<answer>c</answer>", {}).value == 0.0
    assert scored(reward, "<think>a</think><answer>c</answer> and more", {}).value == 0.0


def test_a_worker_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", "secret")
    with pytest.raises(Late):  # a worker of this moment
        call_isolated("format", {"pattern": "^(a+)+$", "text": "a" * 60 + "!"}, 0.3)
    pid = _pid_of_new_worker()
    names = {entry.partition(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry}
    assert b"FIREWORKS_API_KEY" not in names


def _pid_of_new_worker() -> int:
    from cookbook.rewards.isolation import _workers

    call_isolated("format", {"pattern": "a", "text": "a"}, 30.0)
    return next(worker._process.pid for worker in _workers()._all if worker._process is not None)


def test_what_a_worker_cannot_do_is_an_error_and_not_a_reward() -> None:
    with pytest.raises(RewardError, match="TypeError"):
        call_isolated("format", {"wrong": 1}, 30.0)


# reasoning-gym ------------------------------------------------------------------------------------------------------


def rows_of(text: str, path: Path, max_rows: int | None = None, default_seed: int = 0) -> list[dict[str, object]]:
    make_rows(parse_spec(text), path, max_rows, default_seed)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_task_gives_rows_and_scores_their_answers(tmp_path: Path) -> None:
    rows = rows_of("reasoning_gym:chain_sum?size=5&min_terms=2&max_terms=2", tmp_path / "rows.jsonl")
    assert len(rows) == 5
    reward = load_reward("reasoning_gym:chain_sum")
    assert reward.check is not None
    for row in rows:
        assert str(row["question"]) in row["messages"][0]["content"]  # type: ignore[index]
        assert reward.check(row) is None
        assert scored(reward, f"It is <answer>{row['ground_truth']}</answer>", row).value == 1.0
        assert scored(reward, str(row["ground_truth"]), row) == Reward(1.0, {"answered": 0.0})
        assert scored(reward, "<answer>none</answer>", row).value == 0.0


def test_rows_that_are_more_than_json_are_scored_whole(tmp_path: Path) -> None:
    (row,) = rows_of("reasoning_gym:rearc?size=1", tmp_path / "rows.jsonl")
    assert scored(load_reward("reasoning_gym:rearc"), f"<answer>{row['ground_truth']}</answer>", row).value == 1.0


def test_rows_follow_from_name_options_and_seed(tmp_path: Path) -> None:
    def questions(text: str, seed: int = 0) -> list[object]:
        return [row["question"] for row in rows_of(text, tmp_path / "rows.jsonl", 4, seed)]

    task = "reasoning_gym:ransom_note"  # draws from a set: its rows depend on how Python hashes
    assert questions(task) == questions(f"{task}?seed=0") != questions(task, 9)
    assert questions(f"{task}?seed=9", 1) == questions(task, 9)
    code = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(Late):  # another process
        call_isolated("format", {"pattern": "^(a+)+$", "text": "a" * 60 + "!"}, 0.3)
    questions(task, 9)
    assert (tmp_path / "rows.jsonl").read_bytes() == code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reasoning_gym:chain_smu", "there is no task 'chain_smu'. Near: chain_sum"),
        ("reasoning_gym:chain_sum?terms=1", "there is no option terms. Known: allow_negation"),
        ("reasoning_gym:chain_sum?min_terms=0", "are refused: AssertionError"),
        ("reasoning_gym:chain_sum?min_terms=many", "are refused: TypeError"),
    ],
)
def test_tasks_and_options_that_do_not_exist_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_rows(parse_spec(text), tmp_path / "rows.jsonl", None, 0)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_task_are_named(tmp_path: Path) -> None:
    (row,) = rows_of("reasoning_gym:chain_sum?size=1", tmp_path / "rows.jsonl")
    check = load_reward("reasoning_gym:countdown").check
    assert check is not None
    assert "is of the task 'chain_sum', not of 'countdown'" in str(check(row))
    assert "has no ground_truth" in str(check({"messages": []}))
