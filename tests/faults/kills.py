"""The kill suite: disturbed runs, in which one kill follows another, and what became of each kill.

A run is started again and again, with the next kill each time, until all have happened and the run has come to its
end; if it ends earlier, the rest happens in another run. After every start the run is compared with an undisturbed one,
as far as it is, so that what went wrong is known to be the last kill's doing. Which kills: plan.py.

One cell of the suite, or the kills of one that were lost, again:

    python -m tests.faults.kills sft 0
    python -m tests.faults.kills sft 0 trainer@train_step.before:2 flow@commit.after:1
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cookbook.config import Environment
from cookbook.control_plane import connect
from cookbook.janitor import sweep
from tests.faults.checks import Outcome, differences, is_identical, leaks, log_of, outcome, run_id_of
from tests.faults.plan import kills_for
from tests.faults.points import Kill
from tests.faults.runs import Place, config_of, home_of_suite, run_once

__all__ = ["LOST", "Cell", "KillResult", "run_cell"]

KILLS_A_START = 4
"""Armed at once. The first of the flow ends the start; those whose moment has not come stay for the next one."""
LOST = 3
"""Exit status when something was lost; 1 says that the suite itself has failed."""
MAX_FAILURES = 3
"""Starts in a row that may end with an error after a kill of something else than the flow."""


@dataclass(frozen=True)
class KillResult:
    """What became of one kill."""

    recipe: str
    seed: int
    kill: str
    survived: bool
    reason: str = ""
    """Why it counts as lost, and how to see it again."""


@dataclass
class Cell:
    """One recipe with one seed: an undisturbed run, and how the disturbed ones went."""

    recipe: str
    seed: int
    results: list[KillResult] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    """Kills whose moment never came, or that found no process."""
    runs: int = 0
    starts: int = 0
    identical: int = 0
    """Disturbed runs that came out bit for bit as the undisturbed one."""
    restored_itself: int = 0
    """Starts that came to the run's end although something had been killed."""
    seconds: float = 0.0

    @property
    def lost(self) -> list[KillResult]:
        return [result for result in self.results if not result.survived]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_cell(
    recipe: str,
    seed: int,
    place: Place,
    kills: Sequence[Kill] | None = None,
    say: Callable[[str], None] = print,
) -> Cell:
    """Run one recipe undisturbed, then under these kills, by default those of the plan."""
    began = time.monotonic()
    cell = Cell(recipe, seed)
    undisturbed, seconds = _undisturbed(recipe, seed, place)
    say(f"{recipe} {seed}: undisturbed in {seconds:.1f} s")
    queue = list(kills_for(recipe, seed, seconds) if kills is None else kills)
    while queue:
        left = _Disturbed(cell, place, undisturbed, say).run(queue)
        if left == queue:  # all that was armed waited in vain, over a whole run
            cell.unreached += map(str, left[:KILLS_A_START])
            left = left[KILLS_A_START:]
        queue = left
    cell.seconds = round(time.monotonic() - began, 1)
    return cell


def _undisturbed(recipe: str, seed: int, place: Place) -> tuple[Outcome, float]:
    """What it comes to, and the seconds it takes with a trainer that runs."""
    config = config_of(recipe, seed, place, place.folder / f"{recipe}-{seed}-undisturbed")
    place.forget_references()
    began = time.monotonic()
    start = run_once(recipe, config, place)
    assert start.status == 0, f"the undisturbed run failed:\n{log_of(config).read_text()[-3000:]}"
    return outcome(recipe, config, place.home), time.monotonic() - began


class _Disturbed:
    """One disturbed run."""

    def __init__(self, cell: Cell, place: Place, undisturbed: Outcome, say: Callable[[str], None]) -> None:
        cell.runs += 1
        self._cell, self._place, self._undisturbed, self._say = cell, place, undisturbed, say
        name = f"{cell.recipe}-{cell.seed}-run-{cell.runs}"
        self._config = config_of(cell.recipe, cell.seed, place, place.folder / name)
        self._pending: list[str] = []
        """Kills that happened and of which nothing is known yet."""

    def run(self, queue: list[Kill]) -> list[Kill]:
        """Start the run until it ends, or until something is lost; the kills that have not happened."""
        self._place.forget_references()
        failures = 0
        while True:
            batch = queue[:KILLS_A_START]
            start = run_once(self._cell.recipe, self._config, self._place, batch)
            self._cell.starts += 1
            self._pending += start.happened
            happened = list(start.happened)
            self._cell.unreached += start.missed
            queue = [kill for kill in queue if str(kill) not in (*happened, *start.missed)]
            failures = failures + 1 if start.status == 1 else 0
            wrong = self._wrong(start.hung, failures, start.status == 1 and not happened)
            self._say(f"  {self._cell.recipe} {self._cell.seed}: {' '.join(happened) or 'no kill'} -> {start.status}")
            if wrong:
                self._book(wrong)
                return queue
            if start.status == 0:
                self._cell.restored_itself += bool(happened)
                self._end()
                return queue
            self._book([], but_last=True)

    def _wrong(self, hung: bool, failures: int, unprovoked: bool) -> list[str]:
        if hung:
            return ["the flow hangs"]
        if unprovoked or failures > MAX_FAILURES:
            return [f"the run cannot go on: {_last_line(log_of(self._config))}"]
        return differences(self._cell.recipe, self._config, self._place.home, self._undisturbed)

    def _end(self) -> None:
        """Nothing may be left of a run that has ended."""
        with connect("embedded", Environment(self._place.home, "")) as control:
            sweep(self._place.home, control, grace_s=0)
            left = leaks(self._place.home, control, [run_id_of(self._config)])
        found = outcome(self._cell.recipe, self._config, self._place.home)
        self._cell.identical += is_identical(found, self._undisturbed)
        self._book([f"left behind: {what}" for what in left])

    def _book(self, wrong: list[str], *, but_last: bool = False) -> None:
        """Count what happened: survived, or lost when something is wrong."""
        done, self._pending = (self._pending[:-1], self._pending[-1:]) if but_last else (self._pending, [])
        reason = ""
        if wrong:
            again = f"python -m tests.faults.kills {self._cell.recipe} {self._cell.seed} {' '.join(done)}"
            reason = f"{'; '.join(wrong[:5])} [again: {again}; log: {log_of(self._config)}]"
            self._say(f"  LOST {reason}")
        self._cell.results += [KillResult(self._cell.recipe, self._cell.seed, kill, not wrong, reason) for kill in done]
        if wrong and not done:
            self._cell.results.append(KillResult(self._cell.recipe, self._cell.seed, "none", False, reason))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("seed", type=int)
    parser.add_argument("kills", nargs="*", type=Kill.parse, help="PROCESS@POINT:N; none = those of the plan")
    parser.add_argument("--folder", type=Path, help="where all of it happens; kept. Else a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    shutil.rmtree(folder, ignore_errors=True)

    def say(text: str) -> None:
        print(text, flush=True)

    with home_of_suite(folder) as place:
        cell = run_cell(arguments.recipe, arguments.seed, place, arguments.kills or None, say)
    say(json.dumps({name: value for name, value in cell.to_dict().items() if name != "results"}))
    say(f"{len(cell.results)} kills, {len(cell.lost)} lost")
    return LOST if cell.lost else 0


if __name__ == "__main__":
    sys.exit(main())
