"""The worker process of isolation.py: reads one request a line, answers one line, until its input ends."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

import orjson

__all__ = ["TASKS", "main"]

TASKS = {
    "math": "cookbook.rewards.math:verify",
    "math_truth": "cookbook.rewards.math:truth_problem",
    "format": "cookbook.rewards.format:matches",
    "reasoning_gym_score": "cookbook.rewards.reasoning:score_entry",
    "reasoning_gym_truth": "cookbook.rewards.reasoning:entry_problem",
    "reasoning_gym_rows": "cookbook.rewards.reasoning:write_rows",
}
MAX_BYTES = 8 << 30
"""Address space; a text that asks for more is not scored."""


def main() -> None:
    """Serve requests. An orphan ends too: between requests by the end of its input, in one by its alarm."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's; it ends the workers
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in the middle of C code too
    with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    _send(answers, b"ready")
    for line in sys.stdin.buffer:
        request = orjson.loads(line)
        signal.alarm(math.ceil(request["limit_s"]) + 1)
        answer = _answer(request)
        signal.alarm(0)
        _send(answers, orjson.dumps(answer, default=str))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        module, _, function = TASKS[request["task"]].partition(":")
        return {"result": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _send(answers: BinaryIO, line: bytes) -> None:
    answers.write(line + b"\n")
    answers.flush()
