"""The countdown reward: worked by hand, and nothing that a model writes is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cookbook.rewards.countdown import check_countdown, countdown

ROW = {"ground_truth": '{"numbers": [3, 4, 5], "target": 27}'}
RIGHT = {"format": 1.0, "numbers": 1.0}
NO_EXPRESSION = {"format": 0.0, "numbers": 0.0}


@pytest.mark.parametrize(
    "answer", ["3*(4+5)", " (5 + 4) * 3 = 27 ", "3\u00d7(4+5)", "3*\n(4+5)", "-3 * -(4 + 5)", "((3)*(4+5))"]
)
def test_each_number_once_and_the_target_is_worth_1(answer: str) -> None:
    reward = countdown(f"<think>3*4*5</think><answer>{answer}</answer>", ROW)
    assert (reward.value, reward.parts) == (1.0, RIGHT)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [("3*4*5", 1.0), ("27", 0.0), ("3*(4+5)*1", 0.0), ("3*4+5+5+5", 0.0), ("3*9", 0.0), ("3/(4-5)", 1.0)],
)
def test_other_numbers_or_another_value_are_worth_0(answer: str, numbers: float) -> None:
    reward = countdown(f"<answer>{answer}</answer>", ROW)
    assert (reward.value, reward.parts) == (0.0, {"format": 1.0, "numbers": numbers})


@pytest.mark.parametrize(
    "answer",
    [
        "3**4**5**9**9**9",
        "3//4+5",
        "3(4+5)",
        "__import__('os').getcwd()",
        "3*(4+5) = 28",
        "3*(4+5) = 27 = 27",
        "3,4,5",
        "3.0*(4+5)",
        "(" * 900 + "3*(4+5)",
        "-" * 990 + "3",
        "3*(4+5)" + "+0" * 600,
        "03*(4+5)",
        "three",
        "",
    ],
)
def test_what_is_no_expression_of_the_four_operations_is_worth_0(answer: str) -> None:
    reward = countdown(f"<answer>{answer}</answer>", ROW)
    assert reward.value == 0.0
    assert reward.parts == NO_EXPRESSION or answer.startswith("-")


def test_without_tags_there_is_no_answer() -> None:
    assert countdown("3*(4+5)", ROW).parts == NO_EXPRESSION
    assert countdown("<answer>3*(4+5)", ROW).parts == NO_EXPRESSION


def test_fractions_on_the_way_are_exact_and_division_by_zero_is_wrong() -> None:
    row = {"ground_truth": {"numbers": [8, 3, 8, 3], "target": 24}}
    assert countdown("<answer>8/(3-8/3)</answer>", row).value == 1.0
    assert countdown("<answer>8/(3-3)+8</answer>", row).value == 0.0


@pytest.mark.parametrize("truth", ["27", "x", {"numbers": [], "target": 1}, {"numbers": [1.5], "target": 1}, None])
def test_a_row_without_a_task_is_named(truth: object) -> None:
    assert "has no countdown task" in str(check_countdown({"ground_truth": truth}))
    assert "keys: []" in str(check_countdown({}))


def test_public_rows_have_tasks() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "countdown.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout")
    assert {check_countdown(json.loads(line)) for line in path.read_text().splitlines()} == {None}
