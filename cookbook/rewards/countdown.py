"""The reward `countdown`: an arithmetic expression that uses each given number once and reaches the target.

The expression is what a model wrote: it is parsed and walked here, never evaluated by Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import orjson

from cookbook.rewards.answers import after_reasoning, tagged
from cookbook.rewards.records import Reward

__all__ = ["check_countdown", "countdown"]

MAX_CHARACTERS = 1000
_EXPRESSION = re.compile(r"[0-9+\-*/() \t\n]+")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(text: str, row: Mapping[str, Any]) -> Reward:
    """1 where the last <answer>...</answer> is right: + - * / over the numbers, each used once, equal to the target.

    "3 * (4 + 5)" and "3 * (4 + 5) = 27" both will do. Fractions on the way are exact. The row's `ground_truth` is
    {"numbers": [...], "target": n} or the same as JSON text.

    Parts: `format` (an expression in the tags), `numbers` (it uses each number once); both 0 or 1.
    """
    numbers, target = _task(row)
    answer = tagged(after_reasoning(text))
    tree = _parse(answer, target) if answer is not None else None
    if tree is None:
        return Reward(0.0, {"format": 0.0, "numbers": 0.0})
    used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    uses_each = used == Counter(numbers)
    try:
        is_right = uses_each and _value(tree) == target
    except (ZeroDivisionError, RecursionError):
        is_right = False
    return Reward(float(is_right), {"format": 1.0, "numbers": float(uses_each)})


def check_countdown(row: Mapping[str, Any]) -> str | None:
    """Whether the row gives numbers and a target."""
    try:
        _task(row)
    except (KeyError, TypeError, ValueError):
        got = f"ground_truth = {row['ground_truth']!r:.100}" if "ground_truth" in row else f"keys: {sorted(row)}"
        return f'has no countdown task ({got}). Write ground_truth as {{"numbers": [1, 2, 3], "target": 6}}.'
    return None


def _task(row: Mapping[str, Any]) -> tuple[list[int], Fraction]:
    task = row["ground_truth"]
    if isinstance(task, str):
        task = orjson.loads(task)
    numbers = task["numbers"]
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise ValueError(numbers)
    if type(task["target"]) not in (int, float):
        raise ValueError(task["target"])
    return numbers, Fraction(task["target"])


def _parse(answer: str, target: Fraction) -> ast.expr | None:
    """The expression of an answer as a tree of the allowed nodes; None where it is none."""
    answer = answer.translate(_SIGNS).strip()
    expression, equals, result = answer.partition("=")
    if equals and result.strip() != str(target):
        return None
    # The characters that are let through cannot spell a name or a call, nor a number that warns.
    if len(expression) > MAX_CHARACTERS or not _EXPRESSION.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression.strip().replace("\n", " "), mode="eval").body
        return tree if _is_allowed(tree) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two from deep nesting
        return None


def _is_allowed(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS and _is_allowed(node.left) and _is_allowed(node.right)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.UAdd | ast.USub) and _is_allowed(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) is int


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return Fraction(node.value)
