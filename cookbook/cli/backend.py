"""`cookbook backend`: start, look at and stop the embedded backend. Runs start it by themselves."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json

if TYPE_CHECKING:
    from cookbook.embedded import BackendStatus

__all__ = ["app"]

app = typer.Typer(help="The embedded backend: a training server on this machine.", no_args_is_help=True)


@app.command()
def start(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1. 0 = any that is free.", min=0, max=65535)] = 0,
    idle_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a trainer and without a request, after which it ends.")
    ] = 1800,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start the backend, if it does not run. A run does this by itself."""
    from cookbook import embedded

    folder = home_folder(home)
    embedded.ensure_running(folder, port=port, idle_timeout_s=idle_timeout)
    _show(embedded.status(folder), as_json)


@app.command()
def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show whether the backend runs, where, and its trainer jobs."""
    from cookbook import embedded

    _show(embedded.status(home_folder(home)), as_json)


@app.command()
def stop(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop the backend and its trainers. Checkpoints and models stay."""
    from cookbook import embedded

    stopped = embedded.stop(home_folder(home))
    if as_json:
        print_json({"stopped": stopped})
    else:
        typer.echo("stopped" if stopped else "not running")


@app.command()
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
    home: HomeOption = None,
) -> None:
    """Print the end of the backend's log. The log of a trainer is in jobs/ beside it."""
    from cookbook import embedded

    path = embedded.log_path(home_folder(home))
    note(f"{path}:")
    if path.exists():
        with path.open(errors="replace") as file:
            typer.echo("".join(deque(file, lines)), nl=False)
    else:
        note("there is no log yet: this version of the backend was never started here.")


def _show(state: BackendStatus | None, as_json: bool) -> None:
    if as_json:
        print_json({"running": state is not None, **(asdict(state) if state is not None else {})})
    elif state is None:
        typer.echo("not running")
    else:
        jobs = ", ".join(f"{count} {name}" for name, count in sorted(state.jobs.items())) or "none"
        typer.echo(f"running at {state.base_url} (process {state.supervisor_pid}, version {state.version})")
        typer.echo(f"up for {state.uptime_s:,.0f} s, trainer jobs: {jobs}")
