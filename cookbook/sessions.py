"""What `cookbook chat` and `cookbook serve` make on a backend: written down as a run's resources are, freed at the end.

A session is a run directory under <home>/sessions, listed among the runs while it lasts and removed with its
deployments. What a killed one leaves is freed by the next; where there is none, by the backend, as nobody asks it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cookbook.config import DeployConfig
from cookbook.control_plane import ControlPlane
from cookbook.deadlines import Deadline
from cookbook.deployment_request import ServedModel, served_model
from cookbook.deployments import DeploymentHandle, deploy_model, release_deployments
from cookbook.errors import CookbookError
from cookbook.files import read_json
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import LANDING_S
from cookbook.run import RunDirectory, list_runs
from cookbook.termination import undisturbed

__all__ = ["FOLDER", "Session", "open_session"]

FOLDER = "sessions"

_RELEASE_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Models deployed for as long as a command runs."""

    control: ControlPlane
    run: RunDirectory
    ledger: ResourceLedger
    _served: dict[str, ServedModel] = field(default_factory=dict, repr=False)

    def deploy(self, model: str, deployment: DeployConfig, *, role: str = "deployment") -> DeploymentHandle:
        """Have a model ready. Again with the same role: it is asked for a token, and made anew if it is gone.

        The model is looked up the first time: a hub name then stays the same revision.

        Raises:
            ProvisioningError, ModelError, ConfigError, LeaseLost: as for `served_model` and `deploy_model`.
        """
        if model not in self._served:
            self._served[model] = served_model(model, self.control.backend, self.control.models_dir)
        return deploy_model(
            self.control,
            self.ledger,
            self._served[model],
            deployment,
            run_id=self.run.run_id,
            role=role,
            deadline=Deadline(deployment.deployment_timeout_s),
        )


@contextmanager
def open_session(kind: str, control: ControlPlane, home: Path) -> Iterator[Session]:
    """A session whose deployments are deleted at the end, whatever ends it. Ctrl-C cannot break that off.

    Args:
        kind: "chat" or "serve": first part of its id.
        control: the backend. Sessions on it that were killed are cleaned up too.
        home: COOKBOOK_HOME.

    Raises:
        CheckpointError: the home cannot be written.
    """
    _clean_up(control, home)
    (home / FOLDER).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=home / FOLDER))
    with RunDirectory.open(path, recipe=kind, config={"backend": control.backend}, home=home) as run:
        session = Session(control, run, ResourceLedger(run))
        try:
            yield session
        finally:
            with undisturbed():
                session.ledger.close()  # a thread that still deploys makes nothing after this
                _end(control, run, home)


def _clean_up(control: ControlPlane, home: Path) -> None:
    """Free what sessions on this backend have left that were killed."""
    for record in list_runs(home):
        if record.path.parent != home / FOLDER:
            continue
        if record.state == "gone":
            _registry_entry(home, record.run_id).unlink(missing_ok=True)
        elif record.state == "stopped":
            config = (read_json(record.path / "run.json") or {}).get("config") or {}
            if config.get("backend") != control.backend:
                continue
            try:
                with RunDirectory.open(record.path, recipe=record.recipe, config=config, home=home) as run:
                    _end(control, run, home, is_owner_gone=True)
            except CookbookError as error:  # another process is at it, or the backend refuses: it does not concern us
                logger.warning("%s was not cleaned up: %s", record.path, error)


def _end(control: ControlPlane, run: RunDirectory, home: Path, *, is_owner_gone: bool = False) -> None:
    """Delete a session's deployments, then its record; where a deployment cannot be deleted, the record stays.

    So it does where one may still come, unless its owner, who asked for it, has long gone.
    """
    landing_s = 0.0 if is_owner_gone else LANDING_S
    is_free = release_deployments(control, ResourceLedger(run), timeout_s=_RELEASE_TIMEOUT_S, landing_s=landing_s)
    if not is_free and not is_owner_gone:
        logger.warning("a deployment that was asked for has not come; should it, the next chat or serve deletes it")
        return
    shutil.rmtree(run.path, ignore_errors=True)
    _registry_entry(home, run.run_id).unlink(missing_ok=True)


def _registry_entry(home: Path, run_id: str) -> Path:
    return home / "runs" / f"{run_id}.json"
