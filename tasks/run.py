"""An open run: what the tasks of one flow run share, opened before anything costs money and closed whatever happens.

On success the trainer is deleted (its checkpoints stay). On any error, on cancellation and on SIGTERM it is cancelled:
that frees the hardware, and the next start with the same log_path goes on from the last commit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fireworks.training.sdk import TrainingShapeProfile
from prefect.blocks.system import Secret
from prefect.runtime import flow_run

from cookbook.backend_watch import BackendWatch
from cookbook.checkpoints import ResumeInfo, last_commit
from cookbook.client import ReconnectableClient
from cookbook.config import Environment, RecipeConfig
from cookbook.control_plane import CALL_TIMEOUT_S
from cookbook.deployments import DeploymentHandle, release_deployments
from cookbook.errors import LeaseLost, TrainerLost
from cookbook.files import read_jsonl
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import ControlPlane, PromotedModel, TrainerHandle, connect, release_trainers
from cookbook.run import Progress, RunDirectory
from cookbook.saver import Saver
from cookbook.summary import RunSummary
from cookbook.termination import is_interrupt
from cookbook.tracking import LOSS, GoesOn, Tracker, open_tracker
from cookbook.tracking.terminal import numbers_text, step_text
from cookbook.tracking.tracker import METRICS_FILE
from cookbook.upkeep import Upkeep
from cookbook.weight_sync import WeightSync
from tasks.page import SHOWN, page_log, show_report
from tasks.progress import ProgressArtifact
from tasks.record import Records

__all__ = ["Run", "api_key", "due", "due_at_start", "run_name"]

SECRET_BLOCK = "fireworks-api-key"
EVALUATION_GROUP = "eval/"
LAST_UPKEEP_S = 60.0
"""Seconds for what is done after the last commit."""
LAST_COPY_S = 120.0
"""Seconds for the last copy to a mirror."""
URGENT_COPY_S = 3.0
"""The same of a run that was told to stop."""
URGENT_CALL_S = 4.0
"""Seconds for each call that frees something when the run was told to stop."""

logger = logging.getLogger(__name__)


def due(interval: int, progress: Progress) -> bool:
    """Whether something that happens every `interval` steps (0 = never) is due after this step, the last one apart.

    The end of a run saves and evaluates by itself.
    """
    return interval > 0 and progress.step % interval == 0 and progress.step < progress.total_steps


def due_at_start(interval: int, progress: Progress) -> bool:
    """The same where training begins: before the first step, and where the run ended between a step and what was due.

    A resumed run does nothing here that an undisturbed one would not have done.
    """
    return progress.step == 0 or due(interval, progress)


def run_name() -> str:
    """Name of a flow run in the UI: recipe and run directory."""
    config = flow_run.parameters["config"]
    log_path = config["log_path"] if isinstance(config, Mapping) else config.log_path
    return f"{flow_run.flow_name} {Path(log_path).name}"


class Closeable(Protocol):
    """What holds threads or connections."""

    def close(self) -> None: ...


P = TypeVar("P", bound=Closeable)


class Run:
    """What the tasks of one flow run share. A plain class: Prefect does not search such arguments for futures."""

    def __init__(self, config: RecipeConfig, directory: RunDirectory, env: Environment) -> None:
        self.config = config
        self.directory = directory
        self.env = env
        self.ledger = ResourceLedger(directory)
        self.records = Records(config)
        self.tracker: Tracker = open_tracker(config, directory, env)
        self.artifact = ProgressArtifact(directory.run_id)
        self.upkeep = Upkeep(directory, config.storage, env.home)
        self.trainer: TrainerHandle | None = None
        self.deployment: DeploymentHandle | None = None
        self.sync: WeightSync | None = None
        self.progress: Progress | None = None
        """The position whose weights the trainer holds; None until they are restored."""
        self.synced_step: int | None = None
        """Step whose weights the deployment serves; None = no weight sync in this start of the run."""
        self.resumed: ResumeInfo | None = None
        self.model: PromotedModel | None = None
        self.last_loss: float | None = None
        self.train_seconds = 0.0
        self.train_tokens = 0
        self._control: ControlPlane | None = None
        self._client: ReconnectableClient | None = None
        self._closing = ExitStack()
        self.saver = self.closed_at_end(Saver(config.retry))
        self._noted: dict[str, float | None] = {}

    def closed_at_end(self, part: P) -> P:
        """Have `part` closed when the run ends, the last one first, before anything is released."""
        self._closing.callback(part.close)
        return part

    def finished(self) -> RunSummary | None:
        """How an earlier start of this run came to its end; None while it has not."""
        summary = self.directory.summary()
        if summary is not None:
            self.tracker.finish(summary)
        return summary

    @property
    def control(self) -> ControlPlane:
        """The control plane of the run's backend; the embedded one starts on first use."""
        if self._control is None:
            self._control = connect(self.config.backend, self.env, api_key(self.config.backend, self.env))
            if self.config.backend == "embedded":
                self.closed_at_end(BackendWatch(self.env.home))
        return self._control

    @property
    def client(self) -> ReconnectableClient:
        """The session on the policy trainer.

        Raises:
            TrainerLost: none was opened yet.
        """
        if self._client is None:
            raise TrainerLost(f"run {self.directory.run_id} has no session on a trainer yet: restore comes first.")
        return self._client

    @client.setter
    def client(self, client: ReconnectableClient) -> None:
        self._client = client

    def shape_context(self) -> int | None:
        """Context length of the training shape in tokens; None on a manual launch. Reads, provisions nothing."""
        return None if self._shape is None else int(self._shape.max_supported_context_length)

    def accelerators(self) -> dict[str, int] | None:
        """Type -> number of the trainer's accelerators, as the training shape says; None on a manual launch."""
        shape = self._shape
        return None if shape is None else {shape.accelerator_type: shape.accelerator_count * shape.node_count}

    @cached_property
    def _shape(self) -> TrainingShapeProfile | None:
        """The training shape, looked up once; None on a manual launch."""
        name = self.config.infra.training_shape_id
        return None if name is None else self.control.shape(name)

    def start(self, progress: Progress) -> None:
        """Training begins at `progress`: cut what is tracked to it."""
        self.progress = progress
        self.tracker.start(progress, self.accelerators())
        self.artifact.show(progress.step, progress.total_steps)

    def note(self, metrics: Mapping[str, float | None]) -> None:
        """Keep numbers until the next step is logged: sampling and weight syncs belong to the step they serve."""
        self._noted |= metrics

    def log_step(self, progress: Progress, metrics: Mapping[str, float | None], *, tokens: int, seconds: float) -> None:
        """Log one training step everywhere, with what was noted for it, and count it for the summary."""
        self.progress = progress
        noted, self._noted = self._noted, {}
        metrics = {**noted, **metrics}
        self.train_seconds += seconds
        self.train_tokens += tokens
        self.last_loss = metrics[LOSS]
        self.tracker.log_step(progress.step, metrics)
        if text := self.artifact.show(progress.step, progress.total_steps, step_text(metrics)):
            page_log().info(text, extra=SHOWN)

    def say(self, text: str) -> None:
        """One piece of news, for the terminal and for the log of the run's page."""
        self.tracker.event(text)
        page_log().info(text, extra=SHOWN)

    def log_evaluation(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Log held-out numbers of the weights at `progress`."""
        metrics = {f"{EVALUATION_GROUP}{name}": value for name, value in values.items()}
        self.tracker.log_step(progress.step, metrics)
        page_log().info("step %d: %s", progress.step, numbers_text(metrics), extra=SHOWN)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> held-out numbers, of all starts of this run up to where it stands; from metrics.jsonl."""
        found: dict[int, dict[str, float]] = {}
        for row in read_jsonl(self.directory.path / METRICS_FILE):
            values = {k.removeprefix(EVALUATION_GROUP): v for k, v in row.items() if k.startswith(EVALUATION_GROUP)}
            if values:
                found[row["step"]] = values
        return found

    def finish(self, progress: Progress) -> RunSummary:
        """Release the trainer, record how the run ended, show it.

        Raises:
            CookbookError: the checkpoint that was being saved is none.
        """
        self.saver.finish(LAST_UPKEEP_S)
        self._release(delete=True)
        summary = self._summary(progress)
        self.directory.finish(summary)
        self.tracker.finish(summary)
        show_report(summary.to_markdown(), key=f"report-{self.directory.run_id}", description="Report")
        self.upkeep.finish(LAST_COPY_S)
        return summary

    def fail(self, error: BaseException) -> None:
        """Free what the run holds, and record why it ended. Never raises: the error at hand matters more.

        Told to stop, it takes seconds whatever the backend does: the process is killed if it takes longer.
        """
        try:
            self._release(delete=False, timeout_s=URGENT_CALL_S if is_interrupt(error) else CALL_TIMEOUT_S)
        except LeaseLost:
            logger.info("nothing is released: what the run has is its new owner's")
        except Exception as problem:
            logger.warning("not everything could be released, it ends by itself when idle: %s", problem)
        with suppress(Exception):
            self.tracker.finish(error)
        self.upkeep.finish(URGENT_COPY_S if is_interrupt(error) else LAST_COPY_S)

    def give_up(self) -> None:
        """End this start of the run; another follows in this process. What was provisioned is kept, to be found again
        by its id. Never raises."""
        with suppress(Exception):
            self._close()
        self.upkeep.give_up()
        self.tracker.finish(GoesOn())

    def disconnect(self) -> None:
        """Close the connections to the backend: the last thing that is done with a run."""
        if self._control is not None:
            self._control.close()

    @property
    def has_control(self) -> bool:
        """Whether the run has talked to its backend in this start."""
        return self._control is not None

    def _release(self, *, delete: bool, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """All that the run ever asked for, also what was not ready yet when the run ended; of deployments its own."""
        self.ledger.close()  # whatever still provisions in a thread makes nothing after this
        with ExitStack() as steps:  # the last one first; each happens, whatever the others raise
            if self.has_control:
                ledger = ResourceLedger(self.directory)
                steps.callback(release_trainers, self.control, ledger, delete=delete, timeout_s=timeout_s)
                steps.callback(release_deployments, self.control, ledger, timeout_s=timeout_s)
            self._close()

    def _close(self) -> None:
        """Threads and connections of this start."""
        self.records.unbroken.close()
        try:
            with suppress(Exception):  # what fails here must not keep hardware from being freed
                self._closing.close()
        finally:
            if self._client is not None:
                self._client.close()

    def _summary(self, progress: Progress) -> RunSummary:
        evaluations = self.evaluations()
        commit = last_commit(self.directory.path)
        ends = {"before": 0, "after": progress.step}
        return RunSummary(
            run_id=self.directory.run_id,
            recipe=self.config.recipe,
            status="completed",
            log_path=str(self.directory.path),
            base_model=self.config.base_model,
            steps=progress.step,
            epochs=self.config.epochs,
            rows_consumed=progress.data_consumed,
            trained_tokens=progress.trained_tokens,
            resumed_from_step=self.resumed.step if self.resumed is not None else None,
            train_seconds=round(self.train_seconds, 3),
            tokens_per_second=round(self.train_tokens / self.train_seconds, 1) if self.train_seconds else 0.0,
            final_loss=self.last_loss,
            evaluation={name: evaluations[step] for name, step in ends.items() if step in evaluations},
            checkpoint=commit.name if commit is not None else None,
            checkpoint_path=commit.state_path if commit is not None else None,
            model=self.model.name if self.model is not None else None,
            model_folder=str(self.model.folder) if self.model is not None and self.model.folder else None,
            prefect_calls=self.records.table(),
            **self._summary_fields(progress),
        )

    def _summary_fields(self, progress: Progress) -> dict[str, Any]:
        """What a recipe adds to the summary."""
        return {}


def api_key(backend: str, env: Environment) -> str | None:
    """The key of the fireworks backend, from the environment, else the Secret block. The embedded one has its own."""
    if backend != "fireworks" or env.fireworks_api_key is not None:
        return env.fireworks_api_key
    try:
        return str(Secret.load(SECRET_BLOCK).get())  # type: ignore[union-attr]
    except ValueError:  # there is no such block
        return None
