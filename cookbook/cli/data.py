"""`cookbook data`: look at training rows as the trainer will see them, and write example rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cookbook.cli.output import HomeOption, home_folder, note
from cookbook.errors import DataError

__all__ = ["app"]

app = typer.Typer(help="Training data.", no_args_is_help=True)


@app.command("preview")
def preview(
    file: Annotated[Path, typer.Argument(help="JSONL file with chat rows.")],
    model: Annotated[
        str, typer.Option(help="Model whose tokenizer and chat template are used: a name or a folder.")
    ] = "smollm2-135m-instruct",
    row: Annotated[int, typer.Option(min=0, help="Which row; 0 = the first.")] = 0,
    train_on_what: Annotated[
        str | None, typer.Option(help="Which messages are trained, as in a config. Default: the first choice there.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=2, help="Longest row in tokens; says whether this one would be dropped.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Show a row's text with the trained tokens marked."""
    from rich.console import Console

    from cookbook.config import TRAIN_ON_WHAT
    from cookbook.data import JsonlFile, Renderer
    from cookbook.data import preview as preview_text
    from cookbook.models import load_tokenizer

    rows = JsonlFile.open(file)
    if row >= len(rows):
        raise DataError(f"--row {row}, but {file} has {len(rows)} rows. Give 0 to {len(rows) - 1}.")
    tokenizer = load_tokenizer(model, home_folder(home) / "models")
    rendered = Renderer(tokenizer, train_on_what or TRAIN_ON_WHAT[0]).render(rows[row], f"row {row} of {file}")
    Console(highlight=False, soft_wrap=True).print(preview_text(rendered, tokenizer))
    if max_seq_len is not None and len(rendered.tokens) > max_seq_len:
        note(f"dropped: {len(rendered.tokens):,} tokens are more than --max-seq-len {max_seq_len:,}")


@app.command("example")
def example(
    folder: Annotated[Path, typer.Argument(help="Where train.jsonl and held_out.jsonl are written.")],
    train: Annotated[int, typer.Option(min=1, help="Training rows.")] = 1600,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out rows; none of them is a training row.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed writes the same rows.")] = 0,
) -> None:
    """Write rows of an arithmetic task whose answers can be checked."""
    from cookbook.data import make_task

    for path in make_task(folder, num_train=train, num_held_out=held_out, seed=seed):
        typer.echo(path)
