"""`cookbook runs`: the runs that were started on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json, print_table
from cookbook.errors import DataError

if TYPE_CHECKING:
    from cookbook.run import RunRecord

__all__ = ["app"]

app = typer.Typer(help="Runs that were started on this machine.", no_args_is_help=True)


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
    run_id: Annotated[str, typer.Argument(help="Id of `cookbook runs list`, or its beginning.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one run: its state, its last checkpoint, and how it ended."""
    from cookbook.run import list_runs

    run = _find(run_id, list_runs(home_folder(home)))
    details = _details(run)
    if as_json:
        print_json(details)
        return
    for name in ("run_id", "recipe", "state", "created", "path"):
        typer.echo(f"{name:<16}{details[name]}")
    commit = details["last_checkpoint"]
    typer.echo(f"{'checkpoint':<16}" + (f"{commit['name']}, step {commit['step']:,}" if commit else "none"))
    summary = details["summary"]
    if summary is not None:
        from cookbook.summary import RunSummary

        typer.echo(RunSummary.from_dict(summary).to_text())
    if details["evaluation"] is not None:
        from cookbook.evaluation.report import EvaluationReport

        typer.echo(EvaluationReport.from_dict(details["evaluation"]).to_text())


def _find(run_id: str, runs: list[RunRecord]) -> RunRecord:
    matching = [run for run in runs if run.run_id == run_id] or [run for run in runs if run.run_id.startswith(run_id)]
    if len(matching) != 1:
        names = ", ".join(run.run_id for run in matching or runs) or "none"
        what = "more than one run begins with" if matching else "there is no run"
        raise DataError(f"{what} {run_id!r}. Choose one of: {names}.")
    return matching[0]


def _details(run: RunRecord) -> dict[str, Any]:
    from cookbook.checkpoints import read_checkpoints
    from cookbook.files import read_json
    from cookbook.run import EVALUATION_FILE

    commits = read_checkpoints(run.path) if run.path.is_dir() else []
    return {
        **asdict(run),
        "last_checkpoint": asdict(commits[-1]) if commits else None,
        "summary": read_json(run.path / "summary.json"),
        "evaluation": read_json(run.path / EVALUATION_FILE),
    }
