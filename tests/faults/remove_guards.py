"""Takes the guards out of a copy of the checkout, one at a time, and runs what must notice: `remove_guards [NAME]`.

A suite that stays green without a guard does not test it. One that is red with the guard says nothing, so it is run
with it first. Every line that is taken out is found by its text; if it has changed, this says so, and the entry here is
to be changed with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kills import LOST

__all__ = ["GUARDS", "Guard", "is_noticed"]

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("cookbook", "flows", "tasks", "tests", "pyproject.toml")
TIMEOUT_S = 900.0

_KILLS = ("-m", "tests.faults.kills")
_FENCE = ("-m", "pytest", "-q", "-x", "-m", "faults", "-p", "no:cacheprovider", "tests/faults/test_fence.py", "-k")


@dataclass(frozen=True)
class Guard:
    """A guard of the product, how it is taken out, and the smallest part of the suites that must go red then."""

    name: str
    file: str
    text: str
    without: str
    command: tuple[str, ...]

    @property
    def red(self) -> int:
        """Its exit status when it has noticed something; any other says that it did not run."""
        return LOST if self.command[1] != "pytest" else 1


GUARDS = (
    Guard(
        "fence of the run directory",
        "cookbook/run.py",
        'if lease["epoch"] != self.epoch:',
        "if False:",
        (*_FENCE, "save_confirmed or log"),
    ),
    Guard(
        "fence of the trainer",
        "cookbook/backend/trainer/sessions.py",
        "superseded = [s.session_id for s in self._sessions.values() if s.run == run and s.epoch < epoch]",
        "superseded = []",
        (*_FENCE, "train_step.before"),
    ),
    Guard(
        "idempotency of training steps",
        "cookbook/backend/trainer/engine.py",
        'return self._duplicate(known, digest, operation.model_id, str(seq_id), f"seq_id {seq_id}")',
        'return self.submit_once(operation, operation.model_id, f"again-{id(operation)}")',
        ("-m", "tests.faults.proxy_runs", "sft", "0"),
    ),
    Guard(
        "order of save and commit",
        "cookbook/checkpoints.py",
        "_reference(client.job_id, state.result(remaining()))",
        "_reference(client.job_id, name)",
        (*_KILLS, "sft", "0", "trainer@save_confirmed.before:1", "flow@load.before:1"),
    ),
    Guard(
        "row ledger of a restored run",
        "tasks/rl_run.py",
        """            next_row=progress.position,
            open_rows=progress.open_rows,
""",
        """            next_row=progress.data_consumed,  # a count of rows, as if they ended in the order of the data
            open_rows=(),
""",
        (*_KILLS, "rl", "1", "flow@commit.after:1", "flow@commit.after:2"),
    ),
    Guard(
        "record of what was sampled",
        "cookbook/rollouts/store.py",
        "        path = self._file(step)\n        try:\n            lines =",
        "        return None\n        try:\n            lines =",
        (*_KILLS, "rl", "0", "flow@log.after:2"),
    ),
)


def is_noticed(guard: Guard, say: bool = False) -> bool:
    """Whether its part of the suite, green with this guard, goes red in a checkout without it.

    Raises:
        LookupError: the guard is not found where it was.
        RuntimeError: the part of the suite did not run at all, or is red with the guard.
    """
    with tempfile.TemporaryDirectory(prefix="without-guard-") as folder:
        copy = Path(folder) / "checkout"
        _copy(copy)
        _check_green(guard, _run(guard.command, copy, Path(folder) / "tmp-with"))
        path = copy / guard.file
        source = path.read_text()
        if source.count(guard.text) != 1:
            raise LookupError(f"{guard.name}: {guard.file} has {source.count(guard.text)} times: {guard.text}")
        path.write_text(source.replace(guard.text, guard.without))
        result = _run(guard.command, copy, Path(folder) / "tmp")
    if say or result.returncode not in (0, guard.red):
        print(result.stdout[-4000:], flush=True)
    if result.returncode not in (0, guard.red):
        raise RuntimeError(f"{guard.name}: {' '.join(guard.command)} ended with {result.returncode}")
    return result.returncode == guard.red


def _check_green(guard: Guard, result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode != 0:
        print(result.stdout[-4000:], flush=True)
        raise RuntimeError(f"{guard.name}: {' '.join(guard.command)} is red with the guard in place")


def _copy(to: Path) -> None:
    to.mkdir()
    for part in PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / part)


def _run(command: Sequence[str], checkout: Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "TMPDIR": str(temporary)}
    environment.pop("FAULT_REPORTS", None)
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.remove_guards", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="words of the guards' names; none = all")
    parser.add_argument("--verbose", action="store_true", help="show the end of what each part of the suite printed")
    arguments = parser.parse_args()
    guards = [g for g in GUARDS if not arguments.names or any(name in g.name for name in arguments.names)]
    unnoticed = []
    for guard in guards:
        began = time.monotonic()
        noticed = is_noticed(guard, arguments.verbose)
        unnoticed += [] if noticed else [guard.name]
        verdict = "red, and green with it" if noticed else "GREEN: nothing notices that it is gone"
        print(f"without the {guard.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
