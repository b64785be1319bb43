"""What a run leaves behind, and whether a disturbed one left the same as an undisturbed one, and nothing else.

    undisturbed = outcome("sft", config, home)       # of a run that has ended
    problems = differences("sft", other, home, undisturbed)   # [] or one line each; also in the middle of a run
    problems = leaks(home, control, [run_id, ...])   # after cookbook.janitor.sweep(home, control, grace_s=0)

SFT, DPO and ORPO must come out bit for bit. RL as far as it is bound: what was recorded is trained as it was recorded,
every row ends exactly once, and steps trained on the same groups as in the undisturbed run give the same numbers. Which
rows share a step depends on which answer came first, so `is_identical` is a number there, and no demand.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cookbook.checkpoints import CheckpointRow, last_commit, last_promotable, read_checkpoints
from cookbook.control_plane import ControlPlane
from cookbook.files import read_jsonl
from tests.faults.driver import journal
from tests.faults.processes import backend_processes

__all__ = ["Outcome", "differences", "is_identical", "leaks", "log_of", "outcome", "run_id_of"]

_TIMES = ("time", "perf/", "reference/wait_s", "sync/", "sampling/")
"""Metrics that are times, or speak of single requests: they are not the same twice."""

_FREED = ("DELETED", "DELETING", "CANCELLED", "CANCELLING")

Metrics = dict[int, dict[str, float | None]]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    weights: str
    """Hash of the trained tensors of the last commit."""
    optimizer: str
    """Hash of its moments, and the number of steps it counts."""
    sampler: str | None
    """Hash of the last promotable snapshot; None without one."""
    model: str | None
    """Hash of the promoted model; None without one."""
    commit: tuple[int, ...]
    """(step, rows consumed, epoch, position) of the last commit."""
    metrics: Metrics
    """Step -> numbers, times left out."""
    trained: Mapping[int, frozenset[str]]
    """Step -> digests of what was sent to be trained, over all starts: one, or the run changed its mind. RL: and of its
    groups as they were recorded."""


def run_id_of(config: Mapping[str, Any]) -> str:
    """The id of a run that was started."""
    return str(json.loads((Path(config["log_path"]) / "run.json").read_bytes())["run_id"])


def log_of(config: Mapping[str, Any]) -> Path:
    """Where all starts of a run write their output; its journal lies beside."""
    return Path(config["log_path"]).with_suffix(".log")


def outcome(recipe: str, config: Mapping[str, Any], home: Path) -> Outcome:
    """What a run that has ended has come to."""
    path = Path(config["log_path"])
    commit, promotable = last_commit(path), last_promotable(path)
    assert commit is not None, f"{path} has no commit"
    state = _snapshot(home, commit)
    sampler = None if promotable is None else _snapshot(home, promotable, "sampler")
    model = home / "models" / str(config.get("output_model_id")).format(run_id=run_id_of(config))
    optimizer_steps = json.loads((state / "manifest.json").read_bytes())["step"]
    return Outcome(
        weights=_hash_of(state, "model."),
        optimizer=f"{_hash_of(state, 'optimizer.')} after {optimizer_steps} steps",
        sampler=None if sampler is None else _hash_of(sampler),
        model=_hash_of(model) if model.exists() else None,
        commit=_position(commit),
        metrics=_metrics(path),
        trained=_trained(config),
    )


def differences(recipe: str, config: Mapping[str, Any], home: Path, undisturbed: Outcome) -> list[str]:
    """Where a disturbed run is otherwise than it must be; of one that has not ended, as far as it is."""
    path = Path(config["log_path"])
    if not (path / "checkpoints.jsonl").exists():
        return []
    has_ended = (path / "summary.json").exists()
    wrong = _different_steps(recipe, _metrics(path), _trained(config), undisturbed, has_ended=has_ended)
    wrong += _disorder(path) + _incomplete_commits(path, home)
    if recipe == "rl":
        return wrong + _row_account(config, has_ended=has_ended)
    known = {_position(row) for row in read_checkpoints(path)}
    wrong += [f"commit (step, rows, epoch, position) {row}" for row in known if _leads_elsewhere(row, undisturbed)]
    if has_ended:
        found = outcome(recipe, config, home)
        for name in ("weights", "optimizer", "sampler", "model", "commit"):
            ours, theirs = getattr(found, name), getattr(undisturbed, name)
            wrong += [f"{name}: {ours}, undisturbed {theirs}"] if ours != theirs else []
    return wrong


def is_identical(found: Outcome, undisturbed: Outcome) -> bool:
    """Whether weights and optimizer came out bit for bit."""
    return (found.weights, found.optimizer) == (undisturbed.weights, undisturbed.optimizer)


def leaks(home: Path, control: ControlPlane, run_ids: Sequence[str]) -> list[str]:
    """What is still there of runs that have all ended: workers, what the backend says runs, half-written files."""

    def is_ours(name: str) -> bool:
        return any(run_id in name for run_id in run_ids)

    found = [f"process {p.pid}: {p.role} {p.resource_id}" for p in backend_processes(home) if is_ours(p.resource_id)]
    for resource in (*control.list_jobs(), *control.list_deployments()):
        name, state = str(resource["name"]), str(resource["state"])
        found += [f"{name} is {state}"] if is_ours(name) and not state.endswith(_FREED) else []
    for pattern in (".writing-*", ".deleting-*"):
        found += [str(path) for path in home.rglob(pattern)]
    return found


# -- steps -------------------------------------------------------------------------------------------------------------


def _different_steps(
    recipe: str, metrics: Metrics, trained: Mapping[int, frozenset[str]], undisturbed: Outcome, *, has_ended: bool
) -> list[str]:
    """Steps that were trained on other rows than in the undisturbed run, or gave other numbers on the same."""
    wrong = []
    for step, digests in sorted(trained.items()):
        if digests != undisturbed.trained.get(step, frozenset()):
            if recipe == "rl":  # from here on, the runs are different ones
                return wrong
            wrong.append(f"step {step} was trained on {sorted(digests)}, undisturbed {undisturbed.trained.get(step)}")
        if step in metrics:
            wrong += _different_numbers(recipe, step, metrics[step], undisturbed.metrics.get(step, {}))
    if has_ended and recipe != "rl":
        wrong += _different_numbers(recipe, 0, metrics.get(0, {}), undisturbed.metrics.get(0, {}))
        if metrics.keys() != undisturbed.metrics.keys():
            wrong.append(f"metrics of steps {sorted(metrics)}, undisturbed {sorted(undisturbed.metrics)}")
    return wrong


def _different_numbers(
    recipe: str, step: int, found: Mapping[str, float | None], undisturbed: Mapping[str, float | None]
) -> list[str]:
    if recipe == "rl":  # how many were rejected on the way depends on which answer came first; the training does not
        bound = ("train/loss", "train/grad_norm", "train/tokens", "policy/")
        found = {name: value for name, value in found.items() if name.startswith(bound)}
    return [
        f"step {step}: {name} is {value!r}, undisturbed {undisturbed.get(name)!r}"
        for name, value in found.items()
        if value != undisturbed.get(name)
    ]


def _metrics(path: Path) -> Metrics:
    """Of a number that is there twice the later one counts."""
    found: Metrics = {}
    for row in read_jsonl(path / "metrics.jsonl"):
        values = {name: value for name, value in row.items() if name != "step" and not name.startswith(_TIMES)}
        found.setdefault(row["step"], {}).update(values)
    return found


def _disorder(path: Path) -> list[str]:
    """Training steps that are there twice, or after a later one: somebody wrote who should not have."""
    steps = [row["step"] for row in read_jsonl(path / "metrics.jsonl") if "train/loss" in row]
    return [] if steps == sorted(set(steps)) else [f"metrics.jsonl has the steps {steps}"]


def _incomplete_commits(path: Path, home: Path) -> list[str]:
    """Rows of checkpoints.jsonl whose state is not whole on the disk: they were written too early."""
    rows = [row for row in read_checkpoints(path) if row.state_path]
    return [f"commit {row.name} has no state" for row in rows if not (_snapshot(home, row) / "manifest.json").exists()]


def _trained(config: Mapping[str, Any]) -> dict[int, frozenset[str]]:
    found: dict[int, frozenset[str]] = {}
    recorded: dict[int, str] = {}
    for event in _events(config, "recorded", "trained"):
        step, digest = event["step"], event["digest"]
        if event["event"] == "recorded":
            recorded[step] = digest
        else:
            found[step] = found.get(step, frozenset()) | {digest + recorded.get(step, "")}
    return found


def _leads_elsewhere(position: tuple[int, ...], undisturbed: Outcome) -> bool:
    """Whether a commit is at a position that the undisturbed run never was at: rows consumed go with the steps."""
    step, rows, *_ = position
    last_step, last_rows, *_ = undisturbed.commit
    return step > last_step or rows * last_step != last_rows * step


# -- rows of RL --------------------------------------------------------------------------------------------------------


def _row_account(config: Mapping[str, Any], *, has_ended: bool) -> list[str]:
    """What is wrong with the rows: recorded anew after they were trained, trained otherwise than recorded, ended twice,
    or (at the end) never."""
    wrong = []
    recorded: dict[int, Mapping[str, Any]] = {}
    trained: dict[int, str] = {}
    for event in _events(config, "recorded", "trained"):
        step = event["step"]
        if event["event"] == "recorded":
            recorded[step] = event
            if step in trained:
                wrong.append(f"step {step} was recorded and trained, and recorded anew")
        elif trained.setdefault(step, event["digest"]) != event["digest"]:
            wrong.append(f"step {step} was recorded once, and trained as {trained[step]} and as {event['digest']}")
    total = len(Path(config["dataset"]).read_text().splitlines()) * int(config.get("epochs", 1))
    for row in read_checkpoints(Path(config["log_path"])):
        if not row.state_path:
            continue
        pending = len(row.loop_state["open_rows"]) + total - row.loop_state["position"]
        if row.data_consumed + pending != total:
            wrong.append(f"commit {row.name}: {row.data_consumed} rows have ended and {pending} pend, of {total}")
        wrong += _ended_twice(row, recorded)
    if has_ended:
        last = last_commit(config["log_path"])
        rows = Counter(_rows(recorded, 0 if last is None else last.step + 1))
        if rows != Counter(range(total)):
            wrong.append(f"rows that did not end exactly once: {[n for n in range(total) if rows[n] != 1]}")
    return wrong


def _ended_twice(commit: CheckpointRow, recorded: Mapping[int, Mapping[str, Any]]) -> list[str]:
    counts = Counter(_rows(recorded, commit.step))
    return [f"row {row} has ended {count} times at {commit.name}" for row, count in counts.items() if count > 1]


def _rows(recorded: Mapping[int, Mapping[str, Any]], last_step: int) -> Iterator[int]:
    """Rows that were trained or rejected up to a step, as they were recorded last."""
    for step, event in recorded.items():
        if step <= last_step:
            yield from (*event["trained"], *event["rejected"])


# -- files -------------------------------------------------------------------------------------------------------------


def _events(config: Mapping[str, Any], *kinds: str) -> Iterator[dict[str, Any]]:
    for line in journal(log_of(config)).read_text().splitlines():
        event = json.loads(line)
        if event["event"] in kinds:
            yield event


def _position(row: CheckpointRow) -> tuple[int, ...]:
    return (row.step, row.data_consumed, row.loop_state["epoch"], row.loop_state["position"])


def _snapshot(home: Path, row: CheckpointRow, kind: str = "state") -> Path:
    job = home / "checkpoints" / str(row.source_job_id)
    return job / kind / (str(row.sampler_path) if kind == "sampler" else str(row.state_path).rpartition("/")[2])


def _hash_of(folder: Path, prefix: str = "") -> str:
    """Of names, shapes and bytes of all tensors in a folder; not of what else its files hold."""
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    tensor = file.get_tensor(name)
                    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    tensors[name] = f"{tuple(tensor.shape)} {tensor.dtype}".encode() + content
    assert tensors, f"{folder} has no tensors {prefix}*"
    digest = hashlib.sha256()
    for name, content in sorted(tensors.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()[:16]
