"""`cookbook janitor`: free what runs, chats and servers have left behind on a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import EXIT_FAILED, HomeOption, JsonOption, home_folder, note, print_json, print_table

if TYPE_CHECKING:
    from cookbook.janitor import SweepReport

__all__ = ["janitor"]


def janitor(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be freed.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for which something that was just asked for is left alone.")
    ] = 300,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Free trainers and deployments that no live run owns. What others have made is never touched.

    Runs that have stopped can be resumed after it. The flow of the same name does this every few minutes, and retries
    runs whose worker has died. Exits with 1 when something could not be freed or read.
    """
    from cookbook.config import environment
    from cookbook.control_plane import connect
    from cookbook.janitor import backends_to_sweep, sweep

    env = replace(environment(), home=home_folder(home))
    backends = backends_to_sweep(env.home, has_key=env.fireworks_api_key is not None)
    reports = []
    for backend in backends:
        with connect(backend, env) as control:
            reports.append(sweep(env.home, control, grace_s=grace, dry_run=dry_run))
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        _show(reports)
    if any(report.left or report.problems for report in reports):
        raise typer.Exit(EXIT_FAILED)


def _show(reports: list[SweepReport]) -> None:
    rows = [(report.backend, *row.values()) for report in reports for row in report.rows()]
    if rows:
        print_table(["BACKEND", "RESOURCE", "STATE", "RUN", "DONE", "WHY"], rows)
    for report in reports:
        if report.foreign:
            note(f"{report.backend}: {report.foreign} more that no run of this home has asked for; left alone")
        for session in report.sessions:
            note(f"{report.backend}: the record of {session}, which was killed, is removed")
        for problem in report.problems:
            note(f"{report.backend}: {problem} What it may own is left alone.")
    if not rows:
        note("nothing of this home's runs is left on a backend")
