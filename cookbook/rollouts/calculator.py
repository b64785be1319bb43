"""A calculator as an environment: the policy writes <calc>12 * (3 + 4)</calc>, and is told what that gives.

An example of a tool. Arithmetic only, read from the syntax tree; nothing that the policy writes is ever executed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cookbook.rollouts.environment import EnvironmentReply

__all__ = ["Calculator", "calculate"]

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_MAX_CHARACTERS = 200
_MAX_MAGNITUDE = 1e15  # integers are exact in any arithmetic below it, and no power runs away

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> float | int:
    """The value of an expression of numbers, + - * / // % and brackets.

    Raises:
        ValueError: it is something else, too long or large, or divides by zero; the policy may read the text.

    >>> calculate("12 * (3 + 4)")
    84
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"longer than {_MAX_CHARACTERS} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression of numbers, + - * / // % and brackets") from None


def _value(node: ast.expr) -> float | int:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    else:
        raise ValueError("not an expression of numbers, + - * / // % and brackets")
    assert isinstance(value, int | float)
    if abs(value) > _MAX_MAGNITUDE:
        raise ValueError("too large")
    return value


class Calculator:
    """Answers the last <calc>...</calc> of a turn; a turn without one is the final answer and ends the rollout."""

    async def step(self, row: Mapping[str, Any], text: str, tokens: Sequence[int]) -> EnvironmentReply:
        """The value, or what is wrong with the expression."""
        calls = _CALL.findall(text)
        if not calls:
            return EnvironmentReply(done=True)
        try:
            value = calculate(calls[-1])
        except ValueError as error:
            return EnvironmentReply(text=f"Error: {error}.")
        return EnvironmentReply(text=f"{value:.12g}" if isinstance(value, float) else str(value))
