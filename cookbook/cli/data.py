"""`cookbook data`: look at rows as trainer and sampler will see them, and write example rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import HomeOption, home_folder, note
from cookbook.errors import DataError, RewardError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cookbook.data.rl import RLRow

__all__ = ["app"]

app = typer.Typer(help="Training data.", no_args_is_help=True)


@app.command("preview")
def preview(
    file: Annotated[
        Path, typer.Argument(help="JSONL file with chat rows or pairs, or for RL also reasoning_gym:NAME.")
    ],
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
    rl: Annotated[bool, typer.Option("--rl", help="The rows are prompts of RL: show what the sampler gets.")] = False,
    reward: Annotated[
        str | None, typer.Option(help="RL: reward as in a config; says what it gives to --completion.")
    ] = None,
    completion: Annotated[str, typer.Option(help="RL: text that --reward scores.")] = "",
    home: HomeOption = None,
) -> None:
    """Show a row's text with the trained tokens marked: of a conversation, or of both answers of a pair.

    With --rl: a prompt, and what a reward gives to an answer.
    """
    from rich.console import Console

    from cookbook.config import TRAIN_ON_WHAT
    from cookbook.data import JsonlFile, Renderer
    from cookbook.data import preview as preview_text
    from cookbook.data.pairs import is_pair, render_pair
    from cookbook.data.preview import preview_pair
    from cookbook.models import load_tokenizer

    if rl or reward is not None:
        _preview_prompt(str(file), row, load_tokenizer(model, home_folder(home) / "models"), reward, completion)
        return
    rows = JsonlFile.open(file)
    _check_row(row, len(rows), str(file))
    tokenizer = load_tokenizer(model, home_folder(home) / "models")
    renderer, where = Renderer(tokenizer, train_on_what or TRAIN_ON_WHAT[0]), f"row {row} of {file}"
    if is_pair(rows[row]):
        pair = render_pair(rows[row], renderer, where)
        text, length = preview_pair(pair, tokenizer), max(len(pair.chosen.tokens), len(pair.rejected.tokens))
    else:
        rendered = renderer.render(rows[row], where)
        text, length = preview_text(rendered, tokenizer), len(rendered.tokens)
    Console(highlight=False, soft_wrap=True).print(text)
    if max_seq_len is not None and length > max_seq_len:
        note(f"dropped: {length:,} tokens are more than --max-seq-len {max_seq_len:,}")


def _preview_prompt(
    source: str, index: int, tokenizer: PreTrainedTokenizerBase, reward: str | None, completion: str
) -> None:
    import tempfile

    from rich.console import Console

    from cookbook.data import Renderer
    from cookbook.data.preview import preview_prompt
    from cookbook.data.rl import RLRow, open_rows

    with tempfile.TemporaryDirectory() as cache_dir:
        rows = open_rows(source, Path(cache_dir))
        _check_row(index, len(rows), source)
        row = RLRow.of(index, rows[index], Renderer(tokenizer), f"row {index} of {source}")
    Console(highlight=False, soft_wrap=True).print(preview_prompt(row, tokenizer))
    if reward is not None:
        typer.echo(_scored(row, reward, completion))


def _scored(row: RLRow, spec: str, completion: str) -> str:
    from cookbook.rewards import dry_run, load_reward

    try:
        reward = load_reward(spec)
        problem = reward.check(row.fields) if reward.check is not None else None
        if problem is not None:
            raise DataError(f"{row.where} {problem}")
        result = dry_run(reward, row.fields, 30.0, text=completion, where=row.where)
    except RewardError as error:  # on this command line, a wrong input as any other
        raise DataError(str(error)) from error
    parts = "".join(f", {name} {value:g}" for name, value in result.parts.items())
    return f"-- reward {spec} of {completion!r}: {result.value:g}{parts}"


def _check_row(row: int, num_rows: int, source: str) -> None:
    if row >= num_rows:
        raise DataError(f"--row {row}, but {source} has {num_rows} rows. Give 0 to {num_rows - 1}.")


@app.command("example")
def example(
    folder: Annotated[Path, typer.Argument(help="Where {,rl_,preference_}{train,held_out}.jsonl are written.")],
    train: Annotated[int, typer.Option(min=1, help="Training rows.")] = 1600,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out rows; none of them is a training row.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed writes the same rows.")] = 0,
) -> None:
    """Write rows whose answers can be checked: for SFT, for RL (rl_*) and for DPO and ORPO (preference_*)."""
    from cookbook.data import make_preference_task, make_rl_task, make_task

    for make in (make_task, make_rl_task, make_preference_task):
        for path in make(folder, num_train=train, num_held_out=held_out, seed=seed):
            typer.echo(path)
