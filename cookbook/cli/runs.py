"""`cookbook runs`: the runs that were started on this machine, and what starting one again would do."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cookbook.cli import mirror
from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json, print_table
from cookbook.errors import DataError

if TYPE_CHECKING:
    from cookbook.inspection import BackendAnswer, RunOnDisk
    from cookbook.restore_plan import RestorePlan
    from cookbook.snapshots import Snapshot

__all__ = ["app"]

app = typer.Typer(help="Runs that were started on this machine.", no_args_is_help=True)
app.command("pull")(mirror.pull)

_LABEL = 15
_WIDEST = 100


@app.command("list")
def list_(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List all runs, oldest first."""
    from cookbook.run import list_runs

    runs = list_runs(home_folder(home))
    if as_json:
        print_json([asdict(run) for run in runs])
    elif not runs:
        note("no runs yet")
    else:
        cells = [[run.run_id, run.recipe, run.state, run.created, str(run.path)] for run in runs]
        print_table(["RUN", "RECIPE", "STATE", "STARTED", "RUN DIRECTORY"], cells)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Id of `cookbook runs list`, or its beginning; or a run directory.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one run: its state, checkpoints and resources, and what starting it again would do.

    Nothing is changed or started. The backend is asked only where it can be at once.
    """
    from dataclasses import replace

    from cookbook.config import environment
    from cookbook.inspection import RunOnDisk, ask_backend
    from cookbook.restore_plan import plan_restore

    folder = home_folder(home)
    found = RunOnDisk.read(_find(run, folder))
    answer = ask_backend(found, replace(environment(), home=folder))
    plan = plan_restore(found.record, answer.view)
    if as_json:
        print_json(_details(found, answer, plan))
        return
    _show_run(found, answer)
    _show_checkpoints(found, answer)
    _show_resources(found, answer)
    _show_plan(found, plan)
    _show_results(found)


def _find(run: str, home: Path) -> Path:
    """The run directory that is meant."""
    from cookbook.files import read_json
    from cookbook.run import RUN_FILE

    if (Path(run).expanduser() / RUN_FILE).exists():
        return Path(run).expanduser()
    known = sorted(path.stem for path in (home / "runs").glob("*.json"))
    matching = [name for name in known if name == run] or [name for name in known if name.startswith(run)]
    if len(matching) == 1:
        path = Path((read_json(home / "runs" / f"{matching[0]}.json") or {})["path"])
        if (path / RUN_FILE).exists():
            return path
        raise DataError(f"run {matching[0]} was in {path}, which is gone or is no run directory any more.")
    names = ", ".join(matching or known) or "none"
    what = "more than one run begins with" if matching else "there is no run or run directory"
    raise DataError(f"{what} {run!r}. Choose one of: {names}.")


# -- as data -----------------------------------------------------------------------------------------------------------


def _details(found: RunOnDisk, answer: BackendAnswer, plan: RestorePlan) -> dict[str, Any]:
    record = found.record
    checkpoints = [_checkpoint(found, answer, number) for number in range(len(record.commits))]
    return {
        "run_id": record.run_id,
        "recipe": record.recipe,
        "state": found.state,
        "created": found.created,
        "path": str(found.stored.path),
        "lease": dict(found.lease),
        "owner": found.owner,
        "base_model": record.config.get("base_model"),
        "backend": {"name": answer.view.name, "problem": answer.view.problem},
        "last_step": record.last_step,
        "last_checkpoint": next((row for row in reversed(checkpoints) if row["state_path"]), None),
        "checkpoints": checkpoints,
        "resources": _resources(found, answer),
        "upkeep": found.upkeep,
        "restore": plan.to_dict(),
        "summary": found.summary,
        "evaluation": found.evaluation,
    }


def _checkpoint(found: RunOnDisk, answer: BackendAnswer, number: int) -> dict[str, Any]:
    """A row of checkpoints.jsonl, with what the backend says of it: None where it does not say."""
    from cookbook.snapshots import snapshots_of

    row = found.record.commits[number]
    refs = snapshots_of(row)
    there = [answer.snapshots[ref] for ref in refs if ref in answer.snapshots] if answer.snapshots is not None else []
    return {
        **asdict(row),
        "created": max((snapshot.created for snapshot in there), default="") or None,
        "on_backend": None if answer.snapshots is None else _presence(there, len(refs)),
    }


def _presence(there: Sequence[Snapshot], wanted: int) -> str:
    """How much of what a row names the backend has."""
    if len(there) < max(1, wanted):
        return "no"
    return "yes" if all(snapshot.is_whole for snapshot in there) else "damaged"


def _resources(found: RunOnDisk, answer: BackendAnswer) -> list[dict[str, Any]]:
    """The ledger, the newest of a role last, and what the run has adopted."""
    states = answer.view.states
    rows = [
        {**asdict(record), "adopted": False, "backend_state": _state(states, record.resource_id)}
        for record in found.record.resources
    ]
    for wanted in found.record.wanted:
        if wanted.adopted is not None:
            row = {"resource_id": wanted.adopted, "kind": wanted.kind, "role": wanted.role, "generation": 0}
            rows.append({**row, "state": "adopted", "adopted": True, "backend_state": _state(states, wanted.adopted)})
    return rows


def _state(states: Mapping[str, str | None], name: str) -> str | None:
    """In words; None where the backend was not asked."""
    if name not in states:
        return None
    state = states[name]
    return "not there" if state is None else state.replace("_", " ").lower()


# -- as text -----------------------------------------------------------------------------------------------------------


def _show_run(found: RunOnDisk, answer: BackendAnswer) -> None:
    from cookbook.upkeep_record import upkeep_text

    record = found.record
    typer.secho(f"Run {record.run_id}: {found.state}", bold=True)
    asked = "" if answer.view.problem is None else f", not asked: {answer.view.problem}"
    _line("recipe", record.recipe)
    if model := record.config.get("base_model"):
        _line("model", str(model))
    _line("run directory", str(found.stored.path))
    _line("created", f"{_moment(found.created)}, {_age(found.created)}")
    _line("owner" if found.owner is not None else "last owner", _owner(found))
    _line("backend", answer.view.name + asked)
    if record.last_step is not None:
        _line("last step", f"{record.last_step:,}, {_age(_logged(found, record.last_step))}")
    _line("last commit", _last_commit(found, answer))
    for part, text in upkeep_text(found.upkeep):
        _line(part, text)


def _owner(found: RunOnDisk) -> str:
    holder = found.owner or found.lease
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    if holder.get("owner") == "janitor":
        who = f"the janitor, {who}"
    return f"{who}, {_moment(str(holder.get('started', '')))} (lease epoch {found.lease.get('epoch', '?')})"


def _last_commit(found: RunOnDisk, answer: BackendAnswer) -> str:
    commits = [number for number, row in enumerate(found.record.commits) if row.state_path]
    if not commits:
        return "none"
    row = _checkpoint(found, answer, commits[-1])
    state = row["loop_state"]
    parts = [f"{row['name']}: step {row['step']:,}"]
    if "total_steps" in state:
        parts[0] += f" of {state['total_steps']:,}"
    if state.get("position"):
        parts.append(f"row {state['position']:,}" + (f" of epoch {state['epoch'] + 1}" if _has_epochs(found) else ""))
    elif state.get("epoch"):
        parts.append(f"{state['epoch']} epochs done")
    parts.append(f"{row['data_consumed']:,} rows taken in all")
    if (saved := row["created"] or _logged(found, row["step"])) is not None:
        parts.append(f"saved {_age(saved)}")
    return ", ".join(parts)


def _has_epochs(found: RunOnDisk) -> bool:
    """Whether positions are places in an epoch's order: RL counts its rows over the whole run."""
    return found.record.recipe != "rl"


def _logged(found: RunOnDisk, step: int) -> str | None:
    """When a step was done, where the newest metrics tell."""
    if step not in found.reached:
        return None
    return datetime.fromtimestamp(found.reached[step], UTC).isoformat(timespec="seconds")


def _show_checkpoints(found: RunOnDisk, answer: BackendAnswer) -> None:
    rows = [_checkpoint(found, answer, number) for number in range(len(found.record.commits))]
    if not rows:
        return
    cells = [
        [
            row["name"],
            f"{row['step']:,}",
            f"{row['data_consumed']:,}",
            "+".join(kind for kind in ("state", "sampler") if row[f"{kind}_path"]),
            "-" if row["created"] is None else _age(row["created"]),
            row["on_backend"] or "-",
        ]
        for row in rows
    ]
    typer.echo()
    print_table(["CHECKPOINT", "STEP", "ROWS", "HOLDS", "SAVED", "ON BACKEND"], cells)


def _show_resources(found: RunOnDisk, answer: BackendAnswer) -> None:
    rows = _resources(found, answer)
    if not rows:
        return
    cells = [
        [f"{row['role']} {row['kind']}", row["resource_id"], str(row["generation"] or "-"), row["state"]]
        + [row["backend_state"] or "-"]
        for row in rows
    ]
    typer.echo()
    print_table(["RESOURCE", "ID", "GENERATION", "RECORD", "ON BACKEND"], cells)


def _show_plan(found: RunOnDisk, plan: RestorePlan) -> None:
    typer.echo()
    when = "If its process died now and it were started again" if found.state == "running" else "If it is started again"
    typer.secho(when, bold=True)
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    for sentence in plan.sentences:
        typer.echo(
            textwrap.fill(sentence, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
        )


def _show_results(found: RunOnDisk) -> None:
    from cookbook.evaluation.report import EvaluationReport
    from cookbook.summary import RunSummary

    if found.summary is not None:
        typer.echo("\n" + RunSummary.from_dict(dict(found.summary)).to_text())
    if found.evaluation is not None:
        typer.echo("\n" + EvaluationReport.from_dict(dict(found.evaluation)).to_text())


def _line(name: str, value: str) -> None:
    width = max(40, min(_WIDEST, shutil.get_terminal_size().columns) - _LABEL - 2)
    for number, line in enumerate(_wrapped(value, width)):
        typer.echo(f"  {name if number == 0 else '':<{_LABEL}}{line}")


def _wrapped(value: str, width: int) -> Sequence[str]:
    return textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False) or [""]


def _parsed(moment: str) -> datetime | None:
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return parsed if parsed.tzinfo is not None else None


def _moment(moment: str) -> str:
    """A moment as UTC, without what nobody reads."""
    parsed = _parsed(moment)
    return moment if parsed is None else f"{parsed.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _age(moment: str | None) -> str:
    from cookbook.tracking.terminal import duration_text

    parsed = _parsed(moment or "")
    if parsed is None:
        return "at an unknown time"
    seconds = max(0.0, (datetime.now(UTC) - parsed).total_seconds())
    return f"{_days(seconds) if seconds >= 48 * 3600 else duration_text(seconds)} ago"


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days"
