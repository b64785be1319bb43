"""`cookbook checkpoints`: the checkpoints of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cookbook.cli.output import JsonOption, note, print_json, print_table
from cookbook.errors import DataError

__all__ = ["app"]

app = typer.Typer(help="Checkpoints of a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `checkpoints` a group while it has one command."""


@app.command("list")
def list_(
    log_path: Annotated[Path, typer.Argument(help="Run directory.")],
    as_json: JsonOption = False,
) -> None:
    """List a run's checkpoints, oldest first: which can be resumed from, which can be promoted."""
    from cookbook.checkpoints import read_checkpoints

    if not log_path.is_dir():
        raise DataError(f"{log_path} is not a run directory. `cookbook runs list` names the runs of this machine.")
    rows = read_checkpoints(log_path)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    if not rows:
        note(f"no checkpoints in {log_path}")
        return
    cells = [[r.name, f"{r.step:,}", f"{r.data_consumed:,}", r.state_path or "-", r.sampler_path or "-"] for r in rows]
    print_table(["NAME", "STEP", "ROWS", "RESUME FROM", "PROMOTE"], cells)
