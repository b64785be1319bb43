"""Runs one recipe below Prefect in a process of its own, and kills what it is told to kill, at named moments.

As a command (COOKBOOK_HOME and the rest of the environment as for `cookbook run`; config.json is a whole config):

    python -m tests.faults.driver sft config.json --kill trainer@train_step.before:2 --kill flow@commit.after:1

From a test, `start` forks it off a server that has all imports done, in 0.1 s instead of 4 s:

    process = driver.start("sft", config, log=tmp_path / "run.log", environment={"COOKBOOK_HOME": home}, kills=[...])
    status = driver.wait(process, timeout_s=60)     # 0 = done; -9 = killed; 1 = it ended with an error, see `log`

`start` must be called from a main program that does nothing on import (pytest is one): the fork imports it.

Kill points are in points.py, processes in processes.py. `PROCESS@POINT:N` is SIGKILL for PROCESS (flow, trainer,
reference, deployment, control-plane or supervisor) when the flow passes POINT for the n-th time in this process, and
`PROCESS@1.25s` at that moment; the flow goes on then, unless it was the flow. Each kill, each training step and each
recorded group of rollouts is written to a journal beside the log (`journal`), which checks.py reads.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults.points import PHASES, Kill, wrap_phases
from tests.faults.processes import find_process, kill_process

__all__ = ["RECIPES", "journal", "run_recipe", "start", "wait"]

RECIPES = ("sft", "dpo", "orpo", "rl")

_MODULES = {target.partition(":")[0] for targets in PHASES.values() for target in targets}
_PRELOADED = [__name__, *(f"flows.{recipe}" for recipe in RECIPES), *sorted(_MODULES)]
_PRELOADED += ["transformers.tokenization_utils_tokenizers", "transformers.models.llama.configuration_llama"]
_PRELOADED += [
    f"transformers.models.auto.{name}" for name in ("configuration_auto", "modeling_auto", "tokenization_auto")
]


class _Journal:
    """Events of one run over all its starts, as JSON lines. What was written survives SIGKILL."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, "pid": os.getpid(), **values}).encode() + b"\n")


class _Killer:
    """Counts passages, and kills when one is due."""

    def __init__(self, kills: Iterable[Kill], home: Path, log_path: Path, journal: _Journal) -> None:
        self._due = list(kills)
        self._home = home
        self._log_path = log_path
        self._journal = journal
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()
        for kill in self._due:
            if not kill.point:
                timer = threading.Timer(kill.after_s, self._at_moment, [kill])
                timer.daemon = True
                timer.start()

    def _at_moment(self, kill: Kill) -> None:
        with self._lock:
            self._kill(kill)

    def passed(self, point: str) -> None:
        with self._lock:
            self._passed[point] += 1
            due = [kill for kill in self._due if (kill.point, kill.passage) == (point, self._passed[point])]
            for kill in due:
                self._kill(kill)

    def _kill(self, kill: Kill) -> None:
        if kill.process == "flow":
            self._journal.write("kill", kill=str(kill), happened=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if kill.process == "pause":
            self._journal.write("pause", point=kill.point)
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        process = find_process(self._home, kill.process, _run_id(self._log_path))
        self._journal.write("kill", kill=str(kill), happened=process is not None)
        if process is not None:
            print(f"--- SIGKILL for {process} at {kill}", flush=True)
            kill_process(process)


def _run_id(log_path: Path) -> str:
    try:
        return str(json.loads((log_path / "run.json").read_bytes())["run_id"])
    except FileNotFoundError:
        return "there is no run yet"


def run_recipe(recipe: str, config: Mapping[str, Any], kills: Iterable[Kill], journal_path: Path) -> dict[str, Any]:
    """Run one recipe in this process, which must not have run another; its summary."""
    from cookbook.config import RECIPE_CONFIGS, environment

    log_path = Path(config["log_path"])
    written = _Journal(journal_path)
    killer = _Killer(kills, environment().home, log_path, written)
    _note_training(written)
    wrap_phases(killer.passed)
    written.write("start", kills=[str(kill) for kill in kills])
    flow = getattr(importlib.import_module(f"flows.{recipe}"), recipe)
    summary = flow.fn(RECIPE_CONFIGS[recipe].model_validate(config))
    written.write("end")
    return dict(summary.to_dict())


def _note_training(journal: _Journal) -> None:
    """Have the journal tell what is sent to be trained, and which groups were recorded."""
    from cookbook.client import ReconnectableClient
    from cookbook.rollouts.store import RolloutStore

    train_step, gradient = ReconnectableClient.train_step, ReconnectableClient.forward_backward_custom
    optim_step, write_step = ReconnectableClient.optim_step, RolloutStore.write_step

    def noted_train_step(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        journal.write("trained", step=self.step + 1, digest=_digest(data))
        result = train_step(self, data, *args, **kwargs)
        journal.write("stepped", step=self.step)
        return result

    def noted_gradient(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        journal.write("trained", step=self.step + 1, digest=_digest(data))
        return gradient(self, data, *args, **kwargs)

    def noted_optim_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = optim_step(self, *args, **kwargs)
        journal.write("stepped", step=self.step)
        return result

    def noted_write_step(self: Any, step: int, collected: Any) -> Any:
        rows = [[row.row for row in rows] for rows in (collected.groups, collected.rejected)]
        digest = _digest_of_groups(collected.groups)
        journal.write("recorded", step=step + 1, trained=rows[0], rejected=rows[1], digest=digest)
        return write_step(self, step, collected)

    ReconnectableClient.train_step = noted_train_step  # type: ignore[method-assign]
    ReconnectableClient.forward_backward_custom = noted_gradient  # type: ignore[method-assign]
    ReconnectableClient.optim_step = noted_optim_step  # type: ignore[method-assign]
    RolloutStore.write_step = noted_write_step  # type: ignore[method-assign]


def _digest(datums: Sequence[Any]) -> str:
    """Of the tokens and of all that the loss gets with them."""
    digest = hashlib.sha256()
    for datum in datums:
        digest.update(repr(datum.model_input.to_ints()).encode())
        for name, values in sorted(datum.loss_fn_inputs.items()):
            digest.update(name.encode() + values.to_numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest_of_groups(groups: Sequence[Any]) -> str:
    """Of what was sampled, with the numbers that a loss on the client reads: they are not in what is sent."""
    sampled = [[(c.tokens, c.rollout_logprobs, c.sampling_logprobs, c.reward) for c in g.completions] for g in groups]
    return hashlib.sha256(repr(([g.row for g in groups], sampled)).encode()).hexdigest()[:16]


# -- as a process ------------------------------------------------------------------------------------------------------


def start(
    recipe: str,
    config: Mapping[str, Any],
    *,
    log: Path,
    environment: Mapping[str, str],
    kills: Sequence[Kill | str] = (),
) -> BaseProcess:
    """Run a recipe in a forked process of its own; stdout and stderr go to the end of `log`.

    Args:
        environment: is added to this process's. COOKBOOK_HOME must be in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    parsed = [kill if isinstance(kill, Kill) else Kill.parse(kill) for kill in kills]
    process = context.Process(target=_child, args=(recipe, dict(config), log, dict(environment), parsed))
    process.start()
    return process


def wait(process: BaseProcess, timeout_s: float) -> int:
    """The exit status, negative for a signal. A process that does not end shows its threads in the log and is killed.

    Raises:
        TimeoutError: it did not end in time.
    """
    process.join(timeout_s)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1.0)
        process.kill()
        process.join()
        raise TimeoutError(f"the flow did not end within {timeout_s:g} s; its log says where its threads were")
    return process.exitcode


def journal(log: Path) -> Path:
    """Where the events of all starts with this log are."""
    return log.with_suffix(".journal")


def _child(
    recipe: str, config: Mapping[str, Any], log: Path, environment: Mapping[str, str], kills: list[Kill]
) -> None:
    os.setsid()  # a Ctrl-C in the terminal is the suite's alone
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    print(f"\n=== start with {' '.join(map(str, kills)) or 'no kills'}", flush=True)
    sys.exit(_run(recipe, config, kills, journal(log)))


def _run(recipe: str, config: Mapping[str, Any], kills: Iterable[Kill], journal_path: Path) -> int:
    import logging

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        summary = run_recipe(recipe, config, kills, journal_path)
    except Exception:
        traceback.print_exc()
        return 1
    print(json.dumps(summary), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.driver", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("config", type=Path, help="JSON file with the whole config")
    parser.add_argument("--kill", type=Kill.parse, action="append", default=[], help="PROCESS@POINT:N")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    return _run(arguments.recipe, config, arguments.kill, journal(arguments.config))


if __name__ == "__main__":
    sys.exit(main())
