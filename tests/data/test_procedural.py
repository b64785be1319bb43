"""The arithmetic task of a first run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cookbook.data import JsonlFile, Renderer, make_preference_task, make_rl_task, make_task, render_pair
from cookbook.data.procedural import NUM_PROBLEMS, NUM_RL_PROBLEMS
from cookbook.errors import DataError
from cookbook.rewards.answers import numeric


def problems(path: Path) -> list[tuple[int, int, int]]:
    """(left, right, answer) of every row."""
    found = []
    for _, row in JsonlFile.open(path).rows():
        assert not isinstance(row, DataError)
        question, answer = (message["content"] for message in row["messages"])
        match = re.fullmatch(r"What is (\d\d) \+ (\d\d)\? Answer with the number only\.", question)
        assert match is not None, question
        found.append((int(match[1]), int(match[2]), int(answer)))
    return found


def test_answers_are_right_and_rows_render(tmp_path: Path, renderer: Renderer) -> None:
    train, held_out = make_task(tmp_path, num_train=300, num_held_out=100, seed=0)
    assert (len(problems(train)), len(problems(held_out))) == (300, 100)
    assert all(left + right == answer for left, right, answer in problems(train) + problems(held_out))
    assert renderer.render(JsonlFile.open(train)[0], "row 0").num_trained > 0


def test_held_out_problems_are_not_trained_in_either_order(tmp_path: Path) -> None:
    train, held_out = make_task(tmp_path, num_train=NUM_PROBLEMS - 500, num_held_out=500, seed=3)
    pairs = [frozenset(problem[:2]) for path in (train, held_out) for problem in problems(path)]
    assert len(set(pairs)) == len(pairs) == NUM_PROBLEMS == 4095


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [
        make_task(tmp_path / name, num_train=50, num_held_out=20, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    contents = [(train.read_bytes(), held_out.read_bytes()) for train, held_out in files]
    assert contents[0] == contents[1] != contents[2]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["held_out.jsonl", "train.jsonl"]


@pytest.mark.parametrize(("num_train", "num_held_out"), [(0, 5), (5, 0), (4000, 96)])
def test_counts_that_cannot_be_had_are_errors(tmp_path: Path, num_train: int, num_held_out: int) -> None:
    with pytest.raises(DataError, match="there are 4,095 problems"):
        make_task(tmp_path, num_train=num_train, num_held_out=num_held_out, seed=0)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        make_task(tmp_path / "file" / "below", num_train=1, num_held_out=1, seed=0)


# The rows for reinforcement learning -------------------------------------------------------------------------------


def rl_problems(path: Path) -> list[tuple[list[int], str]]:
    """(numbers, ground truth) of every row."""
    found = []
    for _, row in JsonlFile.open(path).rows():
        assert not isinstance(row, DataError)
        (question,) = (message["content"] for message in row["messages"])
        form = r"Numbers: (\d\d(?:, \d\d){3})\. Which one is the largest\? Answer with the number only\."
        match = re.fullmatch(form, question)
        assert match is not None, question
        found.append(([int(number) for number in match[1].split(", ")], row["ground_truth"]))
    return found


def test_rl_rows_are_prompts_with_the_right_truth_in_any_place(tmp_path: Path) -> None:
    train, _ = make_rl_task(tmp_path, num_train=300, num_held_out=100, seed=0)
    found = rl_problems(train)
    assert all(truth == str(max(numbers)) and len(set(numbers)) == 4 for numbers, truth in found)
    places = [numbers.index(int(truth)) for numbers, truth in found]
    assert all(45 < places.count(place) < 105 for place in range(4))
    assert numeric(f"It is {found[0][1]}.", {"ground_truth": found[0][1]}).value == 1.0


def test_held_out_rl_problems_are_not_trained_and_follow_from_the_seed(tmp_path: Path) -> None:
    train, held_out = make_rl_task(tmp_path / "a", num_train=3000, num_held_out=500, seed=3)
    problems = [frozenset(numbers) for path in (train, held_out) for numbers, _ in rl_problems(path)]
    assert len(set(problems)) == len(problems) == 3500
    again, _ = make_rl_task(tmp_path / "b", num_train=3000, num_held_out=500, seed=3)
    other, _ = make_rl_task(tmp_path / "c", num_train=3000, num_held_out=500, seed=4)
    assert train.read_bytes() == again.read_bytes() != other.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["rl_held_out.jsonl", "rl_train.jsonl"]


def test_more_rl_problems_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 2,555,190 problems"):
        make_rl_task(tmp_path, num_train=NUM_RL_PROBLEMS, num_held_out=6, seed=0)


# The pairs of answers ----------------------------------------------------------------------------------------------


def preference_problems(path: Path) -> list[tuple[list[int], int, int]]:
    """(numbers, chosen, rejected) of every row."""
    found = []
    for _, row in JsonlFile.open(path).rows():
        assert not isinstance(row, DataError)
        question, chosen = (message["content"] for message in row["chosen"]["messages"])
        same, rejected = (message["content"] for message in row["rejected"]["messages"])
        assert question == same
        match = re.fullmatch(r"Numbers: (.*)\. Which one is the largest\? Answer in one short sentence\.", question)
        assert match is not None, question
        found.append(([int(number) for number in match[1].split(", ")], named(chosen), named(rejected)))
    return found


def named(answer: str) -> int:
    match = re.fullmatch(r"The largest number is (\d+)\.", answer)
    assert match is not None, answer
    return int(match[1])


def test_chosen_is_the_largest_and_rejected_any_of_the_others(tmp_path: Path, renderer: Renderer) -> None:
    train, held_out = make_preference_task(tmp_path, num_train=300, num_held_out=30, seed=0)
    assert (train.name, held_out.name) == ("preference_train.jsonl", "preference_held_out.jsonl")
    found = preference_problems(train)
    assert len(found) == 300
    assert all(chosen == max(numbers) for numbers, chosen, _ in found)
    ranks = [sorted(numbers).index(rejected) for numbers, _, rejected in found]
    assert all(70 < ranks.count(rank) < 130 for rank in range(3))
    assert ranks.count(3) == 0
    assert render_pair(JsonlFile.open(train)[0], renderer, "row 0").num_trained == 2 * (
        len("The largest number is 11.") + 1
    )  # a token a letter, and the end


def test_pairs_are_of_no_problem_that_is_held_out_or_in_the_rl_task(tmp_path: Path) -> None:
    arguments = {"num_train": 3000, "num_held_out": 500, "seed": 3}
    pairs = [problem for path in make_preference_task(tmp_path, **arguments) for problem in preference_problems(path)]
    prompts = [problem for path in make_rl_task(tmp_path, **arguments) for problem in rl_problems(path)]
    assert len({frozenset(numbers) for numbers, *_ in [*pairs, *prompts]}) == len(pairs) + len(prompts) == 7000
    again = make_preference_task(tmp_path / "again", **arguments)
    other = make_preference_task(tmp_path / "other", **{**arguments, "seed": 4})
    assert (tmp_path / "preference_train.jsonl").read_bytes() == again[0].read_bytes() != other[0].read_bytes()
