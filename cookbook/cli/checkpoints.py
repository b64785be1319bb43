"""`cookbook checkpoints`: what a run has saved; making models of it, and deleting what is not needed any more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json, print_table
from cookbook.errors import BackendError, ConfigError, DataError, ProvisioningError

if TYPE_CHECKING:
    from cookbook.checkpoints import CheckpointRow
    from cookbook.control_plane import ControlPlane
    from cookbook.retention import PrunePlan, PruneResult
    from cookbook.snapshots import Snapshot, SnapshotRef, StoredRun

__all__ = ["app"]

app = typer.Typer(help="Checkpoints of a run: list, promote, delete.", no_args_is_help=True)

LogPath = Annotated[Path, typer.Argument(help="Run directory.")]

_PROMOTE_TIMEOUT_S = 1800.0


@app.command("list")
def list_(
    log_path: LogPath,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the backend: the run's record alone.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a run's checkpoints, oldest first: which can be resumed from or promoted, how large, and still there."""
    from cookbook.checkpoints import read_checkpoints

    if not log_path.is_dir():
        raise DataError(f"{log_path} is not a run directory. `cookbook runs list` names the runs of this machine.")
    rows = read_checkpoints(log_path)
    listed = None if offline else _listed(log_path, home_folder(home))
    described = [_described(row, listed) for row in rows]
    if as_json:
        print_json(described)
    elif rows:
        columns = ["NAME", "STEP", "ROWS", "RESUMABLE", "PROMOTABLE", "SIZE", "SAVED", "ON BACKEND"]
        print_table(columns, [_cells(row) for row in described])
    else:
        note(f"no checkpoints in {log_path}")
    _note_unnamed(log_path, rows, listed)


@app.command()
def promote(
    log_path: LogPath,
    to: Annotated[str, typer.Option(help="Id of the new model: a-z, 0-9 and '-'.")],
    name: Annotated[
        str | None, typer.Argument(help="Checkpoint of `cookbook checkpoints list`. Default: the last promotable one.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model of a checkpoint. Doing it again with the same checkpoint and id changes nothing."""
    from cookbook.config import OUTPUT_MODEL_ID
    from cookbook.models.provenance import provenance_of, record_provenance
    from cookbook.provisioning import promote as promote_checkpoint
    from cookbook.provisioning import wire_model
    from cookbook.snapshots import StoredRun, find_promotable, list_snapshots, trainers_of

    if not OUTPUT_MODEL_ID.fullmatch(to):
        raise DataError(f"--to {to!r} is not a model id: 1 to 63 of a-z, 0-9 and '-', not at the ends.")
    run, folder = StoredRun.read(log_path), home_folder(home)
    with _connect(run, folder) as control:
        ref, row = find_promotable(run.path, name, list_snapshots(control, trainers_of(run.path)))
        base_model = (row.base_model if row is not None else None) or run.config["base_model"]
        model = promote_checkpoint(
            control,
            job_id=ref.job_id,
            snapshot_name=ref.name,
            output_model_id=to,
            base_model=wire_model(base_model, control.backend, control.models_dir),
            timeout_s=float(run.config.get("promote_timeout_s") or _PROMOTE_TIMEOUT_S),
        )
    record_provenance(folder, provenance_of(run.path, model, row or ref, home=folder))
    if as_json:
        print_json({"model": model.name, "kind": model.kind, "path": model.folder, "checkpoint": ref.name})
    else:
        typer.echo(model.name if model.folder is None else f"{model.name}  {model.folder}")


@app.command()
def prune(
    log_path: LogPath,
    keep_last: Annotated[int, typer.Option(min=1, help="Keep so many of the newest checkpoints.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Also keep those whose step is a multiple of this.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete old checkpoints of a stopped run. The last one, and those that other runs or the mirror need, stay."""
    from cookbook.mirror import mirrored_commits
    from cookbook.retention import RetentionPolicy, check_prunable, own_run, plan_prune
    from cookbook.retention import prune as prune_run
    from cookbook.snapshots import StoredRun

    run, folder = StoredRun.read(log_path), home_folder(home)
    policy = RetentionPolicy(keep_last, keep_every)
    check_prunable(run, folder)
    with _connect(run, folder) as control:
        if dry_run:
            plan = plan_prune(control, run.path, policy, home=folder, keep=mirrored_commits(run.path))
            _show_plan(plan, as_json)
            return
        with own_run(run, folder) as directory:
            plan = plan_prune(control, run.path, policy, home=folder, keep=mirrored_commits(run.path))
            if not as_json:
                _show_plan(plan, as_json)
            if not (yes or plan.is_empty):
                what = f"Delete {_gigabytes(plan.size_bytes)}? It cannot be restored."
                typer.confirm(what, abort=True, err=True)
            result = prune_run(control, directory, plan)
    _show_result(plan, result, as_json)


def _connect(run: StoredRun, home: Path) -> ControlPlane:
    """The control plane of a run's backend."""
    from cookbook.config import environment
    from cookbook.provisioning import connect

    if run.backend is None:
        raise DataError(f"{run.path} does not say which backend its run was on, so it cannot be asked.")
    return connect(run.backend, dataclasses.replace(environment(), home=home))


def _listed(log_path: Path, home: Path) -> dict[SnapshotRef, Snapshot] | None:
    """What the backend has; None, said on stderr, when it cannot be asked."""
    from cookbook.snapshots import StoredRun, list_snapshots, trainers_of

    try:
        trainers = trainers_of(log_path)
        if not trainers:
            return {}
        with _connect(StoredRun.read(log_path), home) as control:
            return list_snapshots(control, trainers)
    except (BackendError, ConfigError, DataError, ProvisioningError) as error:
        note(f"the backend was not asked, this is the run's record alone: {error}")
        return None


def _described(row: CheckpointRow, listed: Mapping[SnapshotRef, Snapshot] | None) -> dict[str, Any]:
    """A row, with what the backend says: None where it was not asked or does not say."""
    from cookbook.checkpoints import CheckpointKind
    from cookbook.snapshots import snapshots_of

    refs = snapshots_of(row)
    there = {ref.kind: listed[ref] for ref in refs if listed is not None and ref in listed}
    sampler = there.get(CheckpointKind.SAMPLER)
    sizes = [snapshot.size_bytes for snapshot in there.values() if snapshot.size_bytes is not None]
    return {
        **dataclasses.asdict(row),
        "resumable": bool(row.state_path) and (listed is None or CheckpointKind.STATE in there),
        "promotable": bool(row.sampler_path) and (listed is None or (sampler is not None and sampler.promotable)),
        "size_bytes": sum(sizes) if sizes else None,
        "created": max((snapshot.created for snapshot in there.values()), default="") or None,
        "on_backend": None if listed is None else len(there) == len(refs) > 0,
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    word = {True: "yes", False: "no", None: "-"}
    return [
        row["name"],
        f"{row['step']:,}",
        f"{row['data_consumed']:,}",
        word[row["resumable"]],
        word[row["promotable"]],
        "-" if row["size_bytes"] is None else _gigabytes(row["size_bytes"]),
        "-" if row["created"] is None else row["created"][:19].replace("T", " "),
        word[row["on_backend"]],
    ]


def _note_unnamed(log_path: Path, rows: list[CheckpointRow], listed: Mapping[SnapshotRef, Snapshot] | None) -> None:
    """Say what the run's own trainers have besides its checkpoints."""
    from cookbook.snapshots import own_trainers, snapshots_of

    if listed:
        own, named = own_trainers(log_path), {ref for row in rows for ref in snapshots_of(row)}
        sizes = [found.size_bytes or 0 for ref, found in listed.items() if ref.job_id in own and ref not in named]
        if sizes:
            note(f"besides, {_snapshots(len(sizes))} that no checkpoint names, {_gigabytes(sum(sizes))}: see prune")


def _show_plan(plan: PrunePlan, as_json: bool) -> None:
    if as_json:
        print_json({**_plan(plan), "dry_run": True})
        return
    dropped = [[row.name, f"{row.step:,}", "delete"] for row in plan.rows]
    cells = dropped + [[name, "", f"keep: {why}"] for name, why in plan.kept.items()]
    if cells:
        print_table(["NAME", "STEP", "WHAT"], cells)
    typer.echo(f"to delete: {_counts(len(plan.rows), len(plan.snapshots))}, {_gigabytes(plan.size_bytes)}")


def _show_result(plan: PrunePlan, result: PruneResult, as_json: bool) -> None:
    left = [{"name": str(snapshot.ref), "reason": reason} for snapshot, reason in result.left]
    if as_json:
        freed = {"freed_bytes": result.freed_bytes, "num_deleted": len(result.deleted), "left": left}
        print_json({**_plan(plan), "dry_run": False, **freed})
        return
    typer.echo(f"freed {_gigabytes(result.freed_bytes)}: {_counts(len(result.rows), len(result.deleted))}")
    for entry in left:
        note(f"left for the next prune: the {entry['name']}: {entry['reason']}")


def _plan(plan: PrunePlan) -> dict[str, Any]:
    return {
        "kept": dict(plan.kept),
        "checkpoints": [row.name for row in plan.rows],
        "snapshots": [
            {**dataclasses.asdict(snapshot.ref), "size_bytes": snapshot.size_bytes} for snapshot in plan.snapshots
        ],
        "size_bytes": plan.size_bytes,
    }


def _counts(num_rows: int, num_snapshots: int) -> str:
    rows = "1 checkpoint" if num_rows == 1 else f"{num_rows:,} checkpoints"
    return f"{rows} ({_snapshots(num_snapshots)})"


def _snapshots(number: int) -> str:
    return "1 snapshot" if number == 1 else f"{number:,} snapshots"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.3f} GB"
