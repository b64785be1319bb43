"""The reward `math`: whether an answer equals the true one as mathematics, decided by math-verify.

`verify` and `truth_problem` run in a worker process (isolation.py): a comparison may take for ever, and the library's
own limits work in the main thread of a process only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cookbook.rewards.answers import after_reasoning, boxed, check_text, tagged
from cookbook.rewards.isolation import Late, call_isolated
from cookbook.rewards.records import LoadedReward, Reward

__all__ = ["math_reward", "truth_problem", "verify"]

TRUTH_LIMIT_S = 60.0
"""For the truth of a row, which is read once, on a machine that may still be importing the library."""


def math_reward(limit_s: float) -> LoadedReward:
    """The reward; a text that takes longer than `limit_s` seconds to compare gets 0.

    1 where the answer (the last <answer>, else what math-verify finds: \\boxed{}, $...$, a last expression) equals the
    row's `ground_truth`, a text in LaTeX with or without dollars. Parts: `answered`, and `late` where time ran out.
    """

    def reward(text: str, row: Mapping[str, Any]) -> Reward:
        truth, answer = str(row["ground_truth"]), _answer(text)
        if boxed(answer) == truth.strip():  # most right answers, and words that are no mathematics
            return Reward(1.0, {"answered": 1.0})
        try:
            is_equal, answered = call_isolated("math", {"truth": truth, "answer": answer}, limit_s)
        except Late:
            return Reward(0.0, {"answered": 0.0, "late": 1.0})
        return Reward(float(is_equal), {"answered": float(answered)})

    def check(row: Mapping[str, Any]) -> str | None:
        problem = check_text(row)
        if problem is not None:
            return problem
        try:
            found = call_isolated("math_truth", {"truth": str(row["ground_truth"])}, TRUTH_LIMIT_S)
        except Late:
            found = f"cannot be read within {TRUTH_LIMIT_S:g} s"
        return f"has a ground_truth that {found}: {row['ground_truth']!r:.100}. Correct it." if found else None

    return LoadedReward("math", reward, check, limits_itself=True)


def verify(truth: str, answer: str) -> tuple[bool, bool]:
    """Whether `answer` equals `truth`, and whether there is an answer at all."""
    from math_verify import parse
    from math_verify import verify as are_equal

    try:
        answers = parse(answer, parsing_timeout=None)
        is_equal = bool(answers) and are_equal(_parse_truth(truth), answers, timeout_seconds=None)
    except Exception:  # of what the libraries below trip over in a model's text, anything: it is no right answer
        return False, False
    return bool(is_equal), bool(answers)


def truth_problem(truth: str) -> str | None:
    """What is wrong with the truth of a row, to go on after "ground_truth that"; None = nothing."""
    return None if _parse_truth(truth) else "math-verify cannot read"


def _parse_truth(truth: str) -> list[Any]:
    from math_verify import parse

    marked = any(mark in truth for mark in ("$", "\\boxed", "\\(", "\\["))
    found: list[Any] = parse(truth if marked else f"\\boxed{{{truth}}}", parsing_timeout=None)
    return found


def _answer(text: str) -> str:
    """The part of a completion that answers; what is in answer tags is marked as mathematics."""
    text = after_reasoning(text)
    inside = tagged(text)
    if inside is None:
        return text
    return inside if "\\boxed{" in inside or "$" in inside else f"\\boxed{{{inside}}}"
