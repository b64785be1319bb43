"""The answer in a completion: where it is found, and the rewards `exact` and `numeric` that compare it.

An answer is looked for after the reasoning (`<think>...</think>`): the last <answer>...</answer>, else the last
\\boxed{...}, else the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from cookbook.rewards.records import Reward

__all__ = [
    "after_reasoning",
    "boxed",
    "check_number",
    "check_text",
    "exact",
    "extract_answer",
    "last_number",
    "numeric",
    "tagged",
]

_NUMBER = re.compile(r"(?<![\w.)])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][+-]?\d{1,4})?(?!\w)")


def after_reasoning(text: str) -> str:
    """The text after the last `</think>`; all of it where there is none."""
    return text.rpartition("</think>")[2]


def tagged(text: str) -> str | None:
    """What is inside the last <answer>...</answer>, stripped; None without one."""
    before, found, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside.strip() if found and opened else None


def boxed(text: str) -> str | None:
    """What is inside the braces of the last \\boxed{...}, stripped; None without one, or when it is not closed."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
    return None


def extract_answer(text: str) -> str:
    """The answer of a completion, stripped.

    >>> extract_answer("<think>3 + 4</think>It is <answer> 7 </answer>.")
    '7'
    """
    text = after_reasoning(text)
    for inside in (tagged(text), boxed(text)):
        if inside is not None:
            return inside
    return text.strip()


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None without one. "1,234.50" is one number, "10-3" are 10 and 3.

    >>> last_number("12 apples cost $1,234.50."), last_number("none")
    (Decimal('1234.50'), None)
    """
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:  # more digits than the context has exponents for
        return None


def exact(text: str, row: Mapping[str, Any]) -> Reward:
    """1 where the answer is the row's `ground_truth`, word by word; white space between words does not count."""
    answer = extract_answer(text)
    is_same = answer.split() == str(row["ground_truth"]).split()
    return Reward(float(is_same), {"answered": float(bool(answer))})


def numeric(text: str, row: Mapping[str, Any]) -> Reward:
    """1 where the last number of the answer is the last number of the row's `ground_truth`."""
    number = last_number(extract_answer(text))
    is_same = number is not None and number == last_number(str(row["ground_truth"]))
    return Reward(float(is_same), {"answered": float(number is not None)})


def check_text(row: Mapping[str, Any]) -> str | None:
    """Whether there is a text or number to compare with."""
    truth = row.get("ground_truth")
    if isinstance(truth, str | int | float) and not isinstance(truth, bool) and str(truth).strip():
        return None
    got = f"ground_truth = {truth!r:.100}" if "ground_truth" in row else f"keys: {sorted(row)}"
    return f"has no ground_truth to compare with ({got}). Write a text or a number."


def check_number(row: Mapping[str, Any]) -> str | None:
    """Whether there is a number to compare with."""
    problem = check_text(row)
    if problem is None and last_number(str(row["ground_truth"])) is None:
        return f"has no number in ground_truth = {row['ground_truth']!r:.100}. Write one, or use another reward."
    return problem
