"""`cookbook models`: get models for the embedded backend, and list those that are there."""

from __future__ import annotations

from typing import Annotated

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json, print_table

__all__ = ["app"]

app = typer.Typer(help="Models on this machine.", no_args_is_help=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Name of the model; `cookbook models list` shows which there are.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model, check it and convert it. One that is there already is not touched."""
    from cookbook.models.pull import pull as pull_model

    folder = pull_model(name, home_folder(home) / "models", progress=note)
    if as_json:
        print_json({"name": folder.name, "path": str(folder.path), "licence": folder.licence})
    else:
        typer.echo(f"{folder.name}  {folder.path}")


@app.command("list")
def list_(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the models on this machine and those that can be pulled."""
    from cookbook.models.catalogue import CATALOGUE
    from cookbook.models.folders import list_models

    present = list_models(home_folder(home) / "models")
    absent = sorted(set(CATALOGUE) - {model.name for model in present})
    if as_json:
        there = [{"name": m.name, "path": str(m.path), "source": m.source, "licence": m.licence} for m in present]
        print_json({"models": there, "can_be_pulled": absent})
        return
    if present:
        rows = [[m.name, m.licence, f"{m.size_bytes / 2**20:,.0f} MiB", m.source, str(m.path)] for m in present]
        print_table(["NAME", "LICENCE", "SIZE", "SOURCE", "FOLDER"], rows)
    else:
        note("no models on this machine")
    for name in absent:
        note(f"to pull: `cookbook models pull {name}` ({CATALOGUE[name].download_mb} MB, {CATALOGUE[name].licence})")


@app.command()
def card(
    model: Annotated[str, typer.Argument(help="Name of the model, its folder, or a run directory (its model).")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's card: what it was made from, how, with which data, and what may be done with it."""
    from cookbook.models.export import card_of

    provenance, text = card_of(model, home_folder(home))
    if as_json:
        print_json(provenance.to_dict())
    else:
        typer.echo(text, nl=False)
