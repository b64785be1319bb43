"""The `cookbook` command: its groups, its options, and how errors leave it.

Exit status: 0 = well, 1 = a run or a service failed, 2 = the config, the data or the command line is wrong,
130 = Ctrl-C, 143 = SIGTERM. One file for each group of commands. Heavy imports (torch, transformers, the flows with
Prefect) happen inside the commands that need them, so that help and errors are there at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cookbook.cli import backend, chat, checkpoints, data, doctor, export, janitor, models, run, runs, serve
from cookbook.cli import eval as evaluation
from cookbook.cli.output import ErrorGroup

__all__ = ["app", "main"]

app = typer.Typer(
    name="cookbook",
    cls=ErrorGroup,
    help="Fine-tuning recipes as Prefect flows, on an embedded backend or on Fireworks.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("eval")(evaluation.evaluate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("janitor")(janitor.janitor)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(runs.app, name="runs")
app.add_typer(backend.app, name="backend")


def _show_version(wanted: bool) -> None:
    from importlib import metadata

    if wanted:
        typer.echo(f"cookbook-flows {metadata.version('cookbook-flows')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that come before the command; ErrorGroup reads `debug`."""


def main() -> None:
    """Run the command line of this process, and exit with its status."""
    app()
