"""Progress for people: a bar on a terminal, else a line at most every ten seconds. On stderr: stdout stays clean."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cookbook.tracking.sink import LEARNING_RATE, LOSS, REWARD, TOKENS_PER_S, TOTAL_STEPS, Metrics, Outcome, Sink, Start

__all__ = ["TerminalProgress", "duration_text", "numbers_text", "stderr_handlers", "step_text", "terminal_progress"]

MIN_INTERVAL_S = 10.0
"""Seconds between two lines where there is no terminal."""

ERASE_LINE = "\r\x1b[2K"


def terminal_progress(title: str, stream: TextIO | None = None) -> Sink:
    """The progress display that suits `stream` (None = stderr). `title` names the run."""
    stream = stream if stream is not None else sys.stderr
    return _Bar(title, stream) if stream.isatty() else TerminalProgress(title, stream)


class TerminalProgress(Sink):
    """Lines: the first step, the last one, and between them one at most every ten seconds."""

    def __init__(self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._total_steps = 0
        self._first: tuple[int, float] | None = None
        self._next: dict[str, float] = {}

    def rows_read(self, done: int, total: int) -> None:
        if self._due("rows", done == total):
            self.event(f"read {done:,} of {total:,} rows")

    def start(self, start: Start) -> None:
        self._total_steps = start.total_steps
        if start.step:
            self.event(f"goes on after step {start.step:,} of {start.total_steps:,}")

    def log_step(self, step: int, metrics: Metrics) -> None:
        self._total_steps = int(metrics.get(TOTAL_STEPS) or self._total_steps)
        is_last = step == self._total_steps
        if LOSS not in metrics:
            if self._due("numbers", is_last):
                self.event(f"step {step:,}: {numbers_text(metrics)}")
        elif self._due("steps", is_last):
            self.event(f"step {step:,} of {self._total_steps:,}: {step_text(metrics)}{self._eta(step)}")
        if LOSS in metrics and self._first is None:
            self._first = (step, self._clock())

    def event(self, text: str) -> None:
        self._stream.write(f"{self._title}  {text}\n")
        self._stream.flush()

    def _due(self, kind: str, always: bool) -> bool:
        now = self._clock()
        if now < self._next.get(kind, now) and not always:
            return False
        self._next[kind] = now + MIN_INTERVAL_S
        return True

    def _eta(self, step: int) -> str:
        """The first step takes longer than the others, so the pace is measured from its end."""
        if self._first is None or step == self._total_steps:
            return ""
        first, at = self._first
        pace = (self._clock() - at) / (step - first)
        return f", eta {duration_text(pace * (self._total_steps - step))}"


class _Bar(Sink):
    """A bar that stays on the last line, below the lines of events and of the log."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._title = title
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._filtered: list[logging.Handler] = []

    def rows_read(self, done: int, total: int) -> None:
        self._bar("reading rows", total).update(self._task, completed=done, total=total)

    def start(self, start: Start) -> None:
        self._stop()
        self._bar("training", start.total_steps).update(self._task, completed=start.step)

    def log_step(self, step: int, metrics: Metrics) -> None:
        if LOSS not in metrics:
            self.event(f"step {step:,}: {numbers_text(metrics)}")
        elif self._progress is not None:
            total = metrics.get(TOTAL_STEPS)
            self._progress.update(self._task, completed=step, total=total, numbers=step_text(metrics))

    def event(self, text: str) -> None:
        self._console.print(f"{self._title}  {text}", markup=False)

    def finish(self, outcome: Outcome) -> None:
        self._stop()

    def _bar(self, what: str, total: int) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.fields[title]}  {task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
                expand=True,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(what, total=total, title=self._title, numbers="")
            self._filtered = list(stderr_handlers())
            for handler in self._filtered:
                handler.addFilter(self._make_room)
            self._progress.start()
        return self._progress

    def _make_room(self, record: logging.LogRecord) -> bool:
        """Erase the bar before a handler writes its line; the bar is drawn again below it."""
        self._console.file.write(ERASE_LINE)
        return True

    def _stop(self) -> None:
        for handler in self._filtered:
            handler.removeFilter(self._make_room)
        self._filtered = []
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def step_text(metrics: Metrics) -> str:
    """Reward, loss, learning rate and speed of a step, as far as they were measured."""
    parts = []
    if (reward := metrics.get(REWARD)) is not None:
        parts.append(f"reward {reward:.3f}")
    if (loss := metrics.get(LOSS)) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := metrics.get(LEARNING_RATE)) is not None:
        parts.append(f"lr {rate:.1e}")
    if (speed := metrics.get(TOKENS_PER_S)) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    return ", ".join(parts)


def numbers_text(metrics: Metrics) -> str:
    """Other numbers than a step's: name and value each."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)


def duration_text(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stderr_handlers() -> Iterator[logging.Handler]:
    """The logging handlers that write to this process's stderr, whichever library set them up."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    return (handler for handler in handlers if getattr(handler, "stream", None) in (sys.stderr, sys.__stderr__))
