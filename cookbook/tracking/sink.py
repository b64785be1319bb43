"""What every place that numbers go to can do, and the names of the metrics that some of them look for.

Metrics are floats named `group/name`. The base class does nothing: it is also the stand-in for a place that is off, so
that callers never ask whether it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cookbook.summary import RunSummary

__all__ = [
    "LEARNING_RATE",
    "LOSS",
    "REWARD",
    "STEP_TOKENS",
    "TOKENS_PER_S",
    "TOTAL_STEPS",
    "GoesOn",
    "Metrics",
    "Outcome",
    "Sink",
    "Start",
]

LOSS = "train/loss"
"""Nats a token. A step whose metrics have it is an optimizer step; others are evaluations and the like."""
LEARNING_RATE = "train/learning_rate"
STEP_TOKENS = "train/tokens"
"""Tokens of the step, context included."""
TOKENS_PER_S = "perf/tokens_per_s"
REWARD = "reward/mean"
"""Mean reward of the step's completions."""
TOTAL_STEPS = "train/total_steps"
"""Steps of the whole run as of this step, where that changes: rejected rows make an RL run shorter."""

Metrics = Mapping[str, float | None]
"""Name -> value; None = not measured in this step, and not written."""


class GoesOn(Exception):
    """Only this start of the run has ended: another one follows in the same process."""


Outcome = RunSummary | BaseException
"""How a run ended: well, or with the error (KeyboardInterrupt and the like included) that ended it."""


@dataclass(frozen=True)
class Start:
    """Where training begins or goes on."""

    step: int
    """Optimizer steps done: those of the restored commit, or 0."""
    total_steps: int
    accelerators: Mapping[str, int]
    """Type -> number of the trainer's accelerators."""


class Sink:
    """A place that numbers go to. Called in this order: rows_read*, start, (log_step | event)*, finish."""

    def rows_read(self, done: int, total: int) -> None:
        """`done` of `total` rows of a data file are read."""

    def start(self, start: Start) -> None:
        """Training begins, or goes on from a commit."""

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Numbers of optimizer step `step` (1 = the first)."""

    def event(self, text: str) -> None:
        """Something that people want to read: one line."""

    def finish(self, outcome: Outcome) -> None:
        """The run has ended. Nothing is called after this."""
