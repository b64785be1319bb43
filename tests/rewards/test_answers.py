"""Where the answer of a completion is found, and the rewards that compare it."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cookbook.rewards.answers import boxed, check_number, check_text, exact, extract_answer, last_number, numeric


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 7 ", "7"),
        ("<think>5</think> 7", "7"),
        ("<think>\\boxed{5}</think>6 or <answer>\n7 </answer> I think", "7"),
        ("<answer>1</answer><answer>7</answer>", "7"),
        ("so \\boxed{\\frac{1}{2}} and $\\boxed{ \\frac{3}{4} }$.", "\\frac{3}{4}"),
        ("<answer>7", "<answer>7"),
        ("", ""),
    ],
)
def test_an_answer_is_in_tags_or_a_box_after_the_reasoning_or_the_whole_text(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_a_box_that_is_not_closed_is_none() -> None:
    assert boxed("\\boxed{\\frac{1}{2}") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 apples cost $1,234.50.", "1234.50"),
        ("x=-3.", "-3"),
        ("10-3", "3"),
        ("minus \u22124", "-4"),
        ("1.5e3 m", "1500"),
        ("2, 3 and .5", "0.5"),
        ("no numb3r", None),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_the_last_number_is_read_exactly(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_exact_compares_words() -> None:
    row = {"ground_truth": "New  York"}
    assert exact("<answer>New\nYork</answer>", row).value == 1.0
    assert exact("new york", row).value == 0.0
    assert exact("7", {"ground_truth": 7}).value == 1.0


def test_numeric_compares_numbers_and_tells_an_answer_from_none() -> None:
    row = {"ground_truth": "#### 1,200"}
    assert numeric("It is 1200.0 in all", row).value == 1.0
    assert (numeric("It is 1201", row).value, numeric("It is 1201", row).parts["answered"]) == (0.0, 1.0)
    assert numeric("I do not know", row).parts["answered"] == 0.0


def test_rows_without_a_truth_are_named() -> None:
    assert check_text({"ground_truth": "x"}) is None
    assert "keys: ['answer']" in str(check_text({"answer": "x"}))
    assert "ground_truth = True" in str(check_text({"ground_truth": True}))
    assert "no number in ground_truth = 'x'" in str(check_number({"ground_truth": "x"}))
