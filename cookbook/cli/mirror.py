"""`cookbook runs pull`: a run directory back from its mirror."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cookbook.cli.output import HomeOption, JsonOption, home_folder, note, print_json

__all__ = ["pull"]


def pull(
    url: Annotated[str, typer.Argument(help="Where the run was mirrored to: its storage.mirror_url.")],
    directory: Annotated[Path, typer.Argument(help="Folder for the run directory, empty or absent.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a mirrored run directory back, with every file checked. The same config, with this log_path, resumes it."""
    from cookbook.mirror_pull import pull as pull_run

    pulled = pull_run(url, directory, home=home_folder(home))
    if as_json:
        print_json(asdict(pulled))
    else:
        position = f"checkpoint {pulled.commit}, step {pulled.step:,}" if pulled.commit else "no checkpoint yet"
        typer.echo(f"run {pulled.run_id} as of {pulled.time}: {position}")
        typer.echo(f"{pulled.num_files:,} files, {pulled.size_bytes / 1e6:,.1f} MB, in {pulled.path}")
    for name in pulled.torn:
        note(f"{name} is half-written; the copy before it was taken")
    if pulled.original is not None:
        note(
            f"the run is still in {pulled.original}, and goes on there. This copy can be resumed only once that "
            "directory is gone: two of them would fight over the same trainers."
        )
