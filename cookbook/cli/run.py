"""`cookbook run`: check the whole config, then import the recipe's flow and run it in this process."""

from __future__ import annotations

import copy
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cookbook.cli.output import DEBUG, EXIT_FAILED, JsonOption, note, print_json
from cookbook.errors import ConfigError, CookbookError, Problem

if TYPE_CHECKING:
    from cookbook.config import RecipeConfig
    from cookbook.evaluation_config import EvaluationConfig

__all__ = ["run", "run_flow"]

ENTRY_POINTS = "cookbook.recipes"


def run(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Name of the recipe: sft, rl, dpo or orpo.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with the config.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Set a field, over the file: --set epochs=1 --set infra.extra_args='[--threads=2]'. Repeatable.",
        ),
    ] = None,
    log_path: Annotated[
        Path | None, typer.Option("--log-path", help="Run directory, over the file. The same one again resumes.")
    ] = None,
    as_json: JsonOption = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a recipe, or go on with it: the same log_path resumes from its last checkpoint.

    Every problem of the config is reported at once, before anything starts. With --json, the last line on stdout is
    the run's summary.
    """
    from cookbook.validation import load_config

    ctx.meta[DEBUG] = debug or ctx.find_root().params.get("debug")
    overrides = {"log_path": str(log_path)} if log_path is not None else {}
    loaded = load_config(_config_class(recipe), file=config, sets=sets or [], overrides=overrides)
    with redirect_stdout(sys.stderr):  # whatever a library prints, stdout has the result only
        summary = run_flow(recipe, loaded, debug=ctx.meta[DEBUG])
    if as_json:
        print_json(summary.to_dict())
    else:
        typer.echo(summary.to_text())


def _config_class(recipe: str) -> type[RecipeConfig]:
    from cookbook.config import RECIPE_CONFIGS

    if recipe not in RECIPE_CONFIGS:
        what = f"there is no recipe {recipe!r}."
        raise ConfigError([Problem("recipe", what, f"Choose one of: {', '.join(RECIPE_CONFIGS)}.")])
    return RECIPE_CONFIGS[recipe]


def run_flow(name: str, config: RecipeConfig | EvaluationConfig, *, debug: bool, group: str = ENTRY_POINTS) -> Any:
    """What the flow gives that is installed under `name` in this group of entry points.

    Raises:
        KeyboardInterrupt: on Ctrl-C; its message says how to go on.
        typer.Exit: on an error that is none of ours; it has been shown.
    """
    from cookbook.config import set_prefect_defaults

    set_prefect_defaults()
    flow = _flow(name, group)
    if not debug:
        _show_what_matters()
    try:
        return flow(config)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_go_on(config.log_path)) from error
    except CookbookError:
        raise
    except Exception as error:
        if debug:
            raise
        note(f"error: the run failed with {type(error).__name__}: {error}\nRun it with --debug for the traceback.")
        raise typer.Exit(EXIT_FAILED) from error


def _flow(name: str, group: str) -> Any:
    from importlib import metadata

    found = [point for point in metadata.entry_points(group=group) if point.name == name]
    if not found:
        remedy = "Install the project: `pip install -e .` in its folder."
        raise ConfigError([Problem("recipe", f"the flow of {name!r} is not installed.", remedy)])
    return found[0].load()


def _how_to_go_on(log_path: str) -> str:
    from cookbook.checkpoints import last_commit

    commit = last_commit(log_path)
    if commit is None:
        return "Interrupted. No checkpoint was saved yet: the same command starts this run over."
    return f"Interrupted. The same command goes on from checkpoint {commit.name} in {log_path}."


class _WithoutTraceback(logging.Formatter):
    """Formats as another formatter does, less the traceback; a record that others also get stays as it is."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        shortened = copy.copy(record)
        shortened.exc_info = shortened.exc_text = shortened.stack_info = None
        return self._inner.format(shortened)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what the progress display shows as well, and not the ends of task runs, which come every few seconds."""
    is_routine = record.name == "prefect.task_runs" and record.levelno <= logging.INFO
    return not is_routine and not getattr(record, "shown", False)


def _show_what_matters() -> None:
    """On the terminal, leave out the routine of task runs, and tracebacks: the one message at the end says it all."""
    from cookbook.tracking.terminal import stderr_handlers

    for handler in stderr_handlers():
        handler.addFilter(_is_news)
        if handler.formatter is not None and not isinstance(handler.formatter, _WithoutTraceback):
            handler.setFormatter(_WithoutTraceback(handler.formatter))
