"""`cookbook eval`: evaluate a model, or two side by side, and print each measure with its interval."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cookbook.cli.output import DEBUG, JsonOption, print_json
from cookbook.cli.run import run_flow

if TYPE_CHECKING:
    from cookbook.evaluation_config import EvaluationConfig

__all__ = ["evaluate"]

ENTRY_POINTS = "cookbook.flows"


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Model to evaluate: a name of `cookbook models list`, a model folder, or a run directory (its model)."
        ),
    ],
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="JSONL file with rows, or reasoning_gym:NAME.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Second model, on the same rows with the same seeds.")] = None,
    reward: Annotated[str | None, typer.Option(help="What an answer is worth, as in an RL config.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Answers to each row. Default: 1, greedy.")] = None,
    pass_at: Annotated[
        list[int] | None, typer.Option("--pass-at", metavar="K", help="A k of pass@k. Repeatable. Default: 1.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with the config.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a field, over the file. Repeatable."),
    ] = None,
    log_path: Annotated[
        Path | None, typer.Option("--log-path", help="Run directory. Default: runs/eval-MODEL-TIME.")
    ] = None,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure a model on held-out rows: loss on reference answers, reward, pass@k, and who wins against another.

    The same --log-path again goes on with what is missing, or shows the result. Every answer is in answers.jsonl there.
    """
    from cookbook.config import environment
    from cookbook.evaluation_config import load_evaluation_config
    from cookbook.models.export import model_name

    ctx.meta[DEBUG] = debug or ctx.find_root().params.get("debug")
    home = environment().home
    other = None if against is None else model_name(against, home)
    given: dict[str, Any] = {"dataset": dataset, "against": other, "reward": reward, "samples_per_row": samples}
    given |= {"pass_at": pass_at or None, "log_path": None if log_path is None else str(log_path)}
    overrides: dict[str, Any] = {"model": model_name(model, home)} | {
        name: value for name, value in given.items() if value is not None
    }
    if log_path is None and not _is_set("log_path", config, sets or []):
        overrides["log_path"] = _default_log_path(model)
    loaded = load_evaluation_config(file=config, sets=sets or [], overrides=overrides)
    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout has the result only
        report = _report(loaded, debug=ctx.meta[DEBUG])
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.to_text())


def _report(config: EvaluationConfig, *, debug: bool) -> Any:
    try:
        return run_flow(config.recipe, config, debug=debug, group=ENTRY_POINTS)
    except KeyboardInterrupt as error:
        what = "Interrupted. What was answered is kept: the same command goes on from there, with"
        raise KeyboardInterrupt(f"{what} --log-path {config.log_path}.") from error


def _is_set(name: str, file: Path | None, sets: list[str]) -> bool:
    """Whether the file or a --set gives a field. A file that cannot be read is reported when the config is loaded."""
    if any(item.partition("=")[0].strip() == name for item in sets):
        return True
    if file is None:
        return False
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and name in content


def _default_log_path(model: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-") or "model"
    return f"runs/eval-{slug}-{datetime.now():%Y%m%d-%H%M%S}"
