"""How commands show results and errors: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cookbook.errors import ConfigError, CookbookError, CredentialsError, DataError, ModelError

__all__ = ["DEBUG", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_WRONG_INPUT", "ErrorGroup", "HomeOption", "JsonOption"]
__all__ += ["home_folder", "note", "print_json", "print_table"]

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130

DEBUG = "cookbook.debug"
"""Key in a context's `meta` under which a command passes its own --debug on."""

WRONG_INPUT = (ConfigError, CredentialsError, DataError, ModelError)
"""Errors that the user mends by changing the config, the data or the command line."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: on stdout the result, on stderr all else.")]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="COOKBOOK_HOME to use. Default: the variable, else ~/.cookbook.")
]


class ErrorGroup(TyperGroup):
    """A group of commands whose errors are one message on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CookbookError as error:
            self._show(ctx, error, str(error))
            raise typer.Exit(EXIT_WRONG_INPUT if isinstance(error, WRONG_INPUT) else EXIT_FAILED) from error
        except KeyboardInterrupt as error:
            self._show(ctx, error, str(error) or "Interrupted.", prefix="")
            raise typer.Exit(EXIT_INTERRUPTED) from error

    def _show(self, ctx: Any, error: BaseException, message: str, prefix: str = "error: ") -> None:
        if ctx.params.get("debug") or ctx.meta.get(DEBUG):
            traceback.print_exception(error)
            return
        if prefix:
            typer.secho(prefix, fg=typer.colors.RED, bold=True, err=True, nl=False)
        typer.echo(message, err=True)


def home_folder(home: Path | None) -> Path:
    """COOKBOOK_HOME: the one given, else that of the environment."""
    from cookbook.config import environment

    return home.expanduser().resolve() if home is not None else environment().home


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(value, default=str))


def note(text: str) -> None:
    """Something that is not a result, on stderr."""
    typer.echo(text, err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout. Nothing is cut or wrapped, so that it can be searched and copied."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        typer.secho(text, bold=number == 0)
