"""One flow run with its kills: when what is killed, how the run is brought on after that, and what came of it.

A play runs in a thread; several share a stage, so that a server or worker that one of them kills is lost to all.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.prefect_stage import DEAD, Stage, flow_process, until
from tests.faults.processes import find_process, kill_process

__all__ = ["ACTS", "Act", "Done", "Play", "losses_of", "recorded_rollouts"]

ALIVE_S = 240.0
"""Within so many seconds a run that was brought on must have a process again, or have ended."""

ENDED = ("COMPLETED", *DEAD)
JANITOR = {"settle_s": 3, "grace_s": 5, "max_retries": 20}


@dataclass(frozen=True)
class Act:
    """One kill, and the way in which the run is brought on."""

    target: str
    """flow, worker, both (flow and its worker), server, server+flow (the flow while the server is down), trainer,
    deployment, control-plane."""
    way: str
    """itself (nothing is done), command (`prefect flow-run retry`), button (the UI's), new button (the new UI's), new
    run (with the same log_path), takeover (AwaitingRetry for a run that Prefect believes to run), janitor."""


ACTS = (
    Act("flow", "command"),
    Act("trainer", "itself"),
    Act("both", "takeover"),
    Act("flow", "button"),
    Act("control-plane", "itself"),
    Act("server", "itself"),
    Act("worker", "itself"),
    Act("flow", "new run"),
    Act("deployment", "itself"),
    Act("flow", "janitor"),
    Act("server+flow", "new button"),
    Act("both", "janitor"),
)

MOMENTS = ("step", "commit", "save", "start")
"""At a step; right after a commit's row was written; while a snapshot is written; so many seconds after the process
took the run over."""


@dataclass(frozen=True)
class Done:
    """One kill that happened."""

    act: Act
    moment: str
    hit: str
    """What was killed: the act's target, or what there was of it."""
    step: int
    """Where the run was, by its metrics."""
    way: str
    """How it was brought on in the end."""
    seconds: float
    """Until the run had a live process again; 0 when it kept its own."""


def losses_of(path: Path) -> dict[int, float]:
    """Step -> training loss, from a metrics.jsonl that may just be written."""
    losses = {}
    with suppress(FileNotFoundError):
        for line in (path / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if "train/loss" in row:
                    losses[int(row["step"])] = float(row["train/loss"])
    return losses


def recorded_rollouts(path: Path) -> dict[int, str]:
    """Step -> the rollouts that were recorded for it (RL)."""
    files = (path / "rollouts").glob("step-*.jsonl")
    return {int(file.stem.removeprefix("step-")) + 1: file.read_text() for file in files}


@dataclass
class Play:
    """A flow run of one recipe, killed at seeded moments until it is done."""

    stage: Stage
    home: Path
    recipe: str
    config: Mapping[str, Any]
    acts: tuple[Act, ...]
    rng: random.Random
    total_steps: int
    variables: Mapping[str, str] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    unplanned: int = 0
    """How often the run had to be brought on after somebody else's kill."""
    flow_runs: list[str] = field(default_factory=list)
    problem: str | None = None
    seen: dict[int, tuple[float, str | None]] = field(default_factory=dict)
    """Step -> loss and recorded rollouts, as they were before the last kill at which they were there."""

    @property
    def path(self) -> Path:
        return Path(self.config["log_path"])

    def run(self) -> None:
        """Play it to its end. What goes wrong is in `problem`."""
        try:
            self._submit()
            targets = sorted(self.rng.uniform(0.02, 0.9) * self.total_steps for _ in self.acts)
            for act, target in zip(self.acts, targets, strict=True):
                moment = self.rng.choice(MOMENTS)
                if not self._reached(moment, target):
                    break
                self._perform(act, moment)
            self._to_the_end()
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    # -- moments -------------------------------------------------------------------------------------------------------

    def _reached(self, moment: str, target: float) -> bool:
        """Wait for the moment; False when the run has ended before."""
        if moment == "start":
            time.sleep(self.rng.uniform(0, 8))
            return self._waited(lambda: flow_process(self.path) is not None)
        if not self._waited(lambda: self.step() >= target and flow_process(self.path) is not None):
            return False
        if moment == "commit":
            before = self._commit()
            return self._waited(lambda: self._commit() != before)
        if moment == "save":
            return self._waited(self._is_saving)
        return True

    def _waited(self, condition: Callable[[], bool]) -> bool:
        """Wait for a moment of a live run, which is brought on when another play has killed it."""
        deadline, dead_since = time.monotonic() + 3 * ALIVE_S, None
        while not condition():
            if (self.path / "summary.json").exists():
                return False
            assert time.monotonic() < deadline, f"step {self.step()} after {3 * ALIVE_S:g} s, {self._where()}"
            if flow_process(self.path) is not None:
                dead_since = None
            elif dead_since is None:
                dead_since = time.monotonic()
            elif time.monotonic() - dead_since > 30 and self._is_dead():
                self.unplanned += 1
                self._bring_on("command")
                dead_since = None
            time.sleep(0.005)
        return True

    def _is_dead(self) -> bool:
        """Whether Prefect too knows nobody who is about to start the run."""
        return self.stage.state(self.flow_runs[-1]) in (*DEAD, "RUNNING") and flow_process(self.path) is None

    def step(self) -> int:
        """The last step that was logged."""
        with suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            for line in reversed(file.read().splitlines()):
                with suppress(ValueError):
                    return int(json.loads(line)["step"])
        return 0

    def _commit(self) -> bytes:
        """The last row of the checkpoints; rows of checkpoints that are not kept go."""
        with suppress(FileNotFoundError, IndexError):
            return (self.path / "checkpoints.jsonl").read_bytes().splitlines()[-1]
        return b""

    def _is_saving(self) -> bool:
        checkpoints = (self.home / "checkpoints").glob(f"{self.run_id()}-*/*/.writing-*")
        return next(checkpoints, None) is not None

    def run_id(self) -> str:
        """The run's own id, not Prefect's."""
        return str(json.loads((self.path / "run.json").read_bytes())["run_id"])

    def _epoch(self) -> int:
        with suppress(FileNotFoundError):
            return int(json.loads((self.path / "run.json").read_bytes())["lease"]["epoch"])
        return 0

    # -- kills ---------------------------------------------------------------------------------------------------------

    _stage_lock = threading.Lock()
    """Only one play at a time kills a worker or the server."""
    _janitor_lock = threading.Lock()

    def _perform(self, act: Act, moment: str) -> None:
        self._remember()
        step, epoch, started = self.step(), self._epoch(), time.monotonic()
        hit = self._kill(act.target)
        if not hit:
            return
        way = act.way
        seconds = 0.0
        if way != "itself":
            way = self._bring_on(way)
            until(lambda: self._epoch() > epoch or self._has_ended(), ALIVE_S, f"a new owner, {self._where()}")
            seconds = time.monotonic() - started
        self.done.append(Done(act, moment, hit, step, way, round(seconds, 1)))

    def _kill(self, target: str) -> str:
        """Kill it, or what there is of it; what that was, "" for nothing."""
        if target in ("trainer", "deployment", "control-plane"):
            return self._kill_below(target)
        if target == "flow":
            return "flow" if self._kill_flow() else ""
        with self._stage_lock:
            return self._kill_server(target) if target.startswith("server") else self._kill_worker(target)

    def _kill_below(self, role: str) -> str:
        run_id = "" if role == "control-plane" else self.run_id()
        process = find_process(self.home, role, run_id) or find_process(self.home, "trainer", self.run_id())
        if process is None:
            return ""
        kill_process(process)
        return process.role

    def _kill_flow(self) -> bool:
        pid = flow_process(self.path)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        until(lambda: flow_process(self.path) != pid, 10, f"process {pid} has ended", poll_s=0.01)
        return True

    def _kill_server(self, target: str) -> str:
        """It is back after some seconds on the same database."""
        self.stage.kill_server()
        time.sleep(self.rng.uniform(0, 2))
        with_flow = target == "server+flow" and self._kill_flow()
        time.sleep(self.rng.uniform(0, 5))
        self.stage.start_server()
        return "server+flow" if with_flow else "server"

    def _kill_worker(self, target: str) -> str:
        """It is replaced. A process whose worker has died before has none."""
        pid = flow_process(self.path)
        worker = None if pid is None else self.stage.worker_of(pid)
        if worker is not None:
            worker.kill()
        with_flow = target == "both" and self._kill_flow()
        if worker is not None:
            worker.wait()
            self.stage.start_worker()
        return {(True, True): "both", (True, False): "worker", (False, True): "flow"}.get(
            (worker is not None, with_flow), ""
        )

    # -- ways ----------------------------------------------------------------------------------------------------------

    def _bring_on(self, way: str) -> str:
        """Bring a dead run on; the way that was gone, another one where nobody told Prefect of the death."""
        if way == "janitor":
            self._send_janitor()
            return way
        flow_run = self.flow_runs[-1]
        with suppress(AssertionError):
            until(lambda: self.stage.state(flow_run) in DEAD, 3 if way == "takeover" else 25, "Prefect knows it")
        is_known = self.stage.state(flow_run) == "COMPLETED"
        if flow_process(self.path) is not None or (self._has_ended() and is_known):
            return "itself"
        if way == "new run":
            self._submit()
            return way
        if self.stage.state(flow_run) not in DEAD:
            self.stage.take_over(flow_run)
            return "takeover"
        retry = {
            "command": self.stage.retry_command,
            "new button": lambda run: self.stage.retry_button(run, force=True),
        }.get(way, self.stage.retry_button)
        self.stage.retried(flow_run, retry)
        return way

    def _send_janitor(self) -> None:
        """As its schedule does, again until the run is alive. Only one at a time, as its deployment has it."""
        for _ in range(4):
            with self._janitor_lock:
                if not self._is_dead():
                    return
                janitor = self.stage.submit("janitor", JANITOR)
                until(lambda run=janitor: self.stage.state(run) in ENDED, ALIVE_S, "the janitor is done", 0.5)
        assert not self._is_dead(), f"the janitor ran 4 times and left the run, {self._where()}"

    def _submit(self) -> None:
        self.flow_runs.append(self.stage.submit(self.recipe, self.config, self.variables))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _has_ended(self) -> bool:
        return (self.path / "summary.json").exists()

    def _to_the_end(self) -> None:
        self._waited(self._has_ended)
        flow_run = self.flow_runs[-1]
        deadline = time.monotonic() + ALIVE_S
        while (state := self.stage.state(flow_run)) != "COMPLETED":
            assert time.monotonic() < deadline, f"the run has ended, {self._where()}"
            if state in DEAD or (state == "RUNNING" and flow_process(self.path) is None and not self._is_reported()):
                self.unplanned += 1
                self._bring_on("command")
            time.sleep(0.5)

    def _is_reported(self) -> bool:
        """Whether Prefect hears, within some seconds, how a process ended."""
        with suppress(AssertionError):
            until(lambda: self.stage.state(self.flow_runs[-1]) != "RUNNING", 25, "a report", 0.5)
            return True
        return False

    def _remember(self) -> None:
        """What the run has told so far, of what a restored run must repeat."""
        recorded = recorded_rollouts(self.path)
        losses = losses_of(self.path)
        self.seen |= {step: (loss, recorded.get(step)) for step, loss in losses.items()}

    def _where(self) -> str:
        flow_run = self.flow_runs[-1]
        return f"flow run {flow_run} of {self.path}: {self.stage.history(flow_run)}, step {self.step()}"
