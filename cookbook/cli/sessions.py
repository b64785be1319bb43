"""What `cookbook chat` and `cookbook serve` share: their options for a deployment, and a session to deploy in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cookbook.cli.output import home_folder

if TYPE_CHECKING:
    from cookbook.config import DeployConfig
    from cookbook.sessions import Session

__all__ = ["BackendOption", "ShapeOption", "deploy_config", "session_on"]

BackendOption = Annotated[str, typer.Option("--backend", help="Where to run it: embedded or fireworks.")]
ShapeOption = Annotated[
    str | None, typer.Option("--deployment-shape", help="Deployment shape; needed on fireworks.", metavar="NAME")
]


def deploy_config(shape: str | None) -> DeployConfig:
    """The config of a deployment on this shape."""
    from cookbook.config import DeployConfig

    return DeployConfig(deployment_shape=shape)


@contextmanager
def session_on(backend: str, kind: str, home: Path | None) -> Iterator[Session]:
    """A session on a backend, whose deployments are freed at the end; on SIGTERM and SIGHUP, too."""
    from cookbook.config import BACKENDS, environment
    from cookbook.control_plane import connect
    from cookbook.errors import ConfigError, Problem
    from cookbook.sessions import open_session
    from cookbook.termination import ending_on_signals

    if backend not in BACKENDS:
        raise ConfigError([Problem("--backend", f"there is no backend {backend!r}.", f"Use {' or '.join(BACKENDS)}.")])
    env = replace(environment(), home=home_folder(home))
    with ending_on_signals(), connect(backend, env) as control, open_session(kind, control, env.home) as session:
        yield session
