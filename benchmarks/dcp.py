"""Part `dcp`: how long a save of the training state holds up training, SmolLM2-135M with Adam moments, 1.6 GB.

Ours is the whole path: the official client, the embedded backend's trainer process, hashes, flushed files. A save is
made and waited for (synchronous); then one is begun, and a request behind it that costs nothing tells when the trainer
is free again (asynchronous); then one is begun and training goes on at once. The peer is torch.distributed.checkpoint,
on the same state and disk, in turn. Prints a table in markdown; the exit status is 1 when a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from fireworks.training.sdk import AdamParams

from benchmarks.ours_sft import train_step
from benchmarks.sft import MODEL, ROOT, machine, token_rows
from cookbook import embedded
from cookbook.client import ReconnectableClient
from cookbook.config import SFTConfig, environment
from cookbook.data.rendering import RenderedRow
from cookbook.deadlines import Deadline
from cookbook.errors import RequestRejected
from cookbook.ledger import ResourceLedger
from cookbook.models import resolve_model
from cookbook.provisioning import ControlPlane, connect, provision_trainer, release_trainers
from cookbook.run import RunDirectory

ADAM = AdamParams(learning_rate=1e-5, beta2=0.999, eps=1e-8, weight_decay=0.01)
LIMIT = 0.20
"""Of a synchronous save, how long an asynchronous one may block the trainer."""


@dataclass
class Measured:
    """Seconds, one entry a round."""

    size: int = 0
    """Bytes of one state."""
    synchronous: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    """Steps with nothing else going on."""
    step_after: list[float] = field(default_factory=list)
    """The step right after a save has begun."""
    steps_beside: list[float] = field(default_factory=list)
    """What all steps beside one save took longer than they do alone."""
    confirmed: list[float] = field(default_factory=list)
    """From the beginning of a save beside training to its end."""
    peer: list[float] = field(default_factory=list)


class Bench:
    """A trainer with a state to save."""

    def __init__(self, control: ControlPlane, client: ReconnectableClient, rows: list[RenderedRow], home: Path) -> None:
        self._control = control
        self._client = client
        self._rows = rows
        self._states = home / "checkpoints" / client.job_id / "state"
        self._num_saves = 0

    def one_round(self, measured: Measured, peer: Callable[[Path], float]) -> None:
        """A synchronous save, the peer's, an asynchronous one alone, and one beside training."""
        measured.step += [self.step() for _ in range(2)]
        name = self.next_name()
        measured.synchronous.append(timed(lambda: self._client.save_state(name)))
        folder = self._states / name
        measured.size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        measured.peer.append(peer(folder))
        self.delete(name)

        pending = self._client.begin_save_state(name := self.next_name())
        measured.blocked.append(timed(self.wait_for_turn))
        pending.result()
        self.delete(name)

        pending = self._client.begin_save_state(name := self.next_name())
        with ThreadPoolExecutor(1) as pool:
            confirmed = pool.submit(timed, pending.result)
            beside = [self.step()]
            while not confirmed.done():
                beside.append(self.step())
        measured.confirmed.append(confirmed.result())
        measured.step_after.append(beside[0])
        measured.steps_beside.append(sum(beside) - len(beside) * statistics.median(measured.step))
        self.delete(name)

    def step(self) -> float:
        return train_step(self._client, self._rows, ADAM)[0]

    def wait_for_turn(self) -> None:
        """Until a request has had its turn: it is refused then, as there is no gradient."""
        with suppress(RequestRejected):
            self._client.optim_step(ADAM)

    def next_name(self) -> str:
        self._num_saves += 1
        return f"save-{self._num_saves}"

    def delete(self, name: str) -> None:
        self._control.delete_checkpoint(self._client.job_id, name, "state")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run_peer(python: str, state: Path, folder: Path) -> float:
    """Seconds of the peer's second save: the first one is a warm-up."""
    command = [python, "benchmarks/peer_torch_dcp.py", "--state", str(state), "--folder", str(folder), "--saves", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"][1])


def measure(folder: Path, rounds: int, peer_python: str) -> Measured:
    """All rounds, on a backend of their own that is gone afterwards."""
    token_ids = token_rows(folder)
    rows = [RenderedRow(np.array(row, dtype=np.int32), np.ones(len(row), dtype=np.float32)) for row in token_ids]
    model = str(resolve_model(MODEL, environment().home / "models"))
    env = replace(environment(), home=folder / "home")
    config = SFTConfig(log_path=f"{folder}/run", base_model=model, dataset="LICENSE")
    contents = config.model_dump(mode="json")
    measured = Measured()
    with (
        connect(config.backend, env) as control,
        RunDirectory.open(config.log_path, recipe="sft", config=contents, home=env.home) as run,
    ):
        ledger = ResourceLedger(run)
        trainer = provision_trainer(control, ledger, config, deadline=Deadline(600))
        try:
            with ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model) as client:
                bench = Bench(control, client, rows, env.home)
                bench.step()
                bench.one_round(Measured(), lambda _: 0.0)  # the first save makes the buffer for the others
                for number in range(rounds):
                    bench.one_round(measured, lambda state: run_peer(peer_python, state, folder / "peer"))
                    print(f"round {number + 1} of {rounds}", file=sys.stderr)
        finally:
            release_trainers(control, ledger, delete=True)
            embedded.stop(env.home)
    return measured


def report(measured: Measured) -> str:
    """The result as markdown."""
    size = measured.size / 1e9
    synchronous, peer, blocked = map(statistics.median, (measured.synchronous, measured.peer, measured.blocked))
    step, after = statistics.median(measured.step), statistics.median(measured.step_after)
    rows = [
        ("torch DCP, synchronous, no hashes", f"{peer:.2f} s", f"{size / peer:.2f} GB/s"),
        ("ours, synchronous, with hashes", f"{synchronous:.2f} s", f"{size / synchronous:.2f} GB/s"),
        (
            "ours beside training: the trainer is blocked for",
            f"{blocked:.2f} s",
            f"{blocked / synchronous:.0%} of ours",
        ),
        ("until it is confirmed", f"{statistics.median(measured.confirmed):.2f} s", ""),
        ("a step alone", f"{step:.2f} s", ""),
        ("the step right after the save has begun", f"{after:.2f} s", f"{after - step:+.2f} s"),
        ("all steps beside one save", f"{statistics.median(measured.steps_beside):+.2f} s", ""),
    ]
    raw = {
        "torch DCP": measured.peer,
        "synchronous": measured.synchronous,
        "blocked": measured.blocked,
        "confirmed": measured.confirmed,
        "step": measured.step,
        "step after": measured.step_after,
    }
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}",
        "",
        f"State of {size:.2f} GB: blocked for {blocked / synchronous:.0%} of our synchronous save, "
        f"{blocked / peer:.0%} of torch's (limit: {LIMIT:.0%} of a synchronous one).",
        "",
        "| what | median | |",
        "|---|---|---|",
        *(f"| {what} | {seconds} | {note} |" for what, seconds, note in rows),
        "",
        *(f"{name}, seconds: {', '.join(f'{s:.2f}' for s in values)}" for name, values in raw.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write, 5 GB; default: the system's folder for temporary files")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder), options.rounds, options.peer_python)
    print(report(measured))
    if statistics.median(measured.blocked) > LIMIT * statistics.median(measured.synchronous):
        raise SystemExit(f"over the limit of {LIMIT:.0%}")


if __name__ == "__main__":
    main()
