"""`cookbook data`: look at training rows as the trainer will see them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cookbook.cli.output import HomeOption, home_folder, note
from cookbook.config import TRAIN_ON_WHAT
from cookbook.errors import DataError

__all__ = ["app"]

app = typer.Typer(help="Training data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `data` a group while it has one command."""


@app.command("preview")
def preview(
    file: Annotated[Path, typer.Argument(help="JSONL file with chat rows.")],
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer and chat template are used: a name or a folder.")
    ] = "smollm2-135m-instruct",
    row: Annotated[int, typer.Option(min=0, help="Which row; 0 = the first.")] = 0,
    train_on_what: Annotated[str, typer.Option(help=f"One of: {', '.join(TRAIN_ON_WHAT)}.")] = TRAIN_ON_WHAT[0],
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Longest row in tokens; says whether this one would be dropped.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Show a row's text with the trained tokens marked."""
    from rich.console import Console

    from cookbook.data import JsonlFile, Renderer
    from cookbook.data import preview as preview_text
    from cookbook.models import load_tokenizer

    rows = JsonlFile.open(file)
    if row >= len(rows):
        raise DataError(f"--row {row}, but {file} has {len(rows)} rows. Give 0 to {len(rows) - 1}.")
    tokenizer = load_tokenizer(model, home_folder(home) / "models")
    rendered = Renderer(tokenizer, train_on_what).render(rows[row], f"row {row} of {file}")
    Console(highlight=False, soft_wrap=True).print(preview_text(rendered, tokenizer))
    if max_seq_len is not None and len(rendered.tokens) > max_seq_len:
        note(f"dropped: {len(rendered.tokens):,} tokens are more than --max-seq-len {max_seq_len:,}")
