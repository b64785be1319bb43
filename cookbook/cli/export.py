"""`cookbook export`: a model of this machine as a folder for others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json

__all__ = ["export"]


def export(
    model: Annotated[
        str, typer.Argument(help="Name of `cookbook models list`, a model folder, or a run directory (its model).")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; new or empty.")],
    format: Annotated[
        str,
        typer.Option("--format", help="merged = works on its own; adapter = the LoRA adapter alone; auto = merged."),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Weights as float32, bfloat16 or float16. Default: as the model or its base."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as a Hugging Face or PEFT folder, with its model card and where it comes from."""
    from cookbook.models.export import export_model

    with _terminated_as_interrupted():
        exported = export_model(model, to, home=home_folder(home), format=format, dtype=dtype, progress=note)
    if as_json:
        print_json(exported.to_dict())
        return
    typer.echo(str(exported.folder))
    licence = exported.licence or "licence unknown: find out before you pass it on"
    note(f"{exported.format}, {exported.dtype}, {exported.size_bytes / 2**20:,.1f} MiB, {licence}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that what was half written goes."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("Terminated; nothing was exported.")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
