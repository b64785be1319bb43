"""An open evaluation: what its tasks share. What it deployed is deleted at its end, whatever happens.

Answers are kept as they come: an evaluation that was killed goes on from there, under the same seeds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cookbook.config import Environment, environment
from cookbook.control_plane import ControlPlane, connect
from cookbook.deployment_state import is_lost
from cookbook.deployments import DeploymentHandle, release_deployments
from cookbook.errors import CheckpointError, ConfigError, DataError, ModelError, Problem
from cookbook.evaluation.report import EvaluationReport, RowResult, make_report
from cookbook.evaluation.rows import open_evaluation_rows
from cookbook.evaluation_config import MODEL, EvaluationConfig
from cookbook.files import read_json
from cookbook.ledger import ResourceLedger
from cookbook.models.folders import HUB_NAME
from cookbook.models.provenance import add_evaluation
from cookbook.rollouts.sampler import RolloutSampler
from cookbook.run import EVALUATION_FILE, RunDirectory
from cookbook.served import served_snapshot
from cookbook.termination import undisturbed
from cookbook.tracking import Start
from cookbook.tracking.terminal import terminal_progress
from cookbook.tracking.wandb_sink import WandbSink
from tasks.eval_kept import KeptEvaluation
from tasks.page import SHOWN, page_log, show_report, show_table
from tasks.record import Records
from tasks.run import api_key

__all__ = ["EvalRun", "open_evaluation"]

SHOWN_ROWS = 50
"""Rows of the table in the UI."""
WANDB_ROWS = 1000
PROGRESS_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


class EvalRun(KeptEvaluation):
    """What the tasks of one evaluation share. A plain class: Prefect does not search such arguments for futures."""

    def __init__(self, config: EvaluationConfig, directory: RunDirectory, env: Environment) -> None:
        super().__init__(config, directory, env)
        self.ledger = ResourceLedger(directory)
        self.records = Records(config)
        self.wins: list[list[float]] = []
        """Row -> sample -> 1, 0.5 or 0; empty with one model, or where nothing tells who wins."""
        self._terminal = terminal_progress(directory.run_id)
        self._control: ControlPlane | None = None
        self._sampler: RolloutSampler | None = None
        self._deployment: DeploymentHandle | None = None

    @property
    def control(self) -> ControlPlane:
        """The control plane of the backend; the embedded one starts on first use."""
        if self._control is None:
            self._control = connect(self.config.backend, self.env, api_key(self.config.backend, self.env))
        return self._control

    @property
    def sampler(self) -> RolloutSampler:
        """The sampler of the model that is deployed now."""
        assert self._sampler is not None, "provision_model comes first"
        return self._sampler

    def shape_context(self) -> int | None:
        """Context length of the training shape in tokens; None where none is set. Reads, provisions nothing."""
        name = self.config.infra.training_shape_id
        return None if name is None else int(self.control.shape(name).max_supported_context_length)

    def sample_from(self, deployment: DeploymentHandle) -> None:
        """Send requests to this deployment from now on."""
        config = self.config
        self._close_sampler()
        self._deployment = deployment
        self._sampler = RolloutSampler(
            self.control.deployments.inference_url,
            deployment.model,
            self.control.jobs.api_key,
            None,
            config.concurrency,
            config.deployment.replica_count or 1,
            float(config.deployment.sample_timeout),
            config.retry,
            lambda: is_lost(self.control, deployment.deployment_id),
        )

    def check_version(self, role: str) -> str:
        """The snapshot that the deployment serves; "" = the model itself, as an own one always does.

        Raises:
            ModelError: it is not what the model in `role` was measured with until now.
        """
        assert self._deployment is not None, "provision_model comes first"
        if not self._deployment.adopted:
            return ""
        served = served_snapshot(self.control, self._deployment)
        for measured in self.versions(role):
            self.check_same_version(role, measured, served)
        return served

    def check_same_version(self, role: str, measured: str, served: str) -> None:
        """ModelError where two answers of the model in `role` came from different weights."""
        if measured != served:
            name = self.config.deployment_of(role).deployment_id
            raise ModelError(
                f"deployment {name!r} serves {_snapshot(served)} now, and was measured with {_snapshot(measured)}: "
                "another one was hot loaded meanwhile, and their answers would be mixed. Let no training run load into "
                "it, or evaluate a promoted model; then use a new log_path."
            )

    def say(self, text: str) -> None:
        """One piece of news, for the terminal and for the log of the run's page."""
        self._terminal.event(text)
        page_log().info(text, extra=SHOWN)

    def counter(self, what: str, total: int, done: int = 0) -> Callable[[], None]:
        """Counts calls, from any thread, and says how many there were: at most every ten seconds."""
        log, last, count = page_log(), time.monotonic(), done

        def counted() -> None:
            nonlocal last, count
            count += 1
            if time.monotonic() - last >= PROGRESS_INTERVAL_S:
                last = time.monotonic()
                text = f"{count:,} of {total:,} {what}"
                self._terminal.event(text)
                log.info(text, extra=SHOWN)

        return counted

    # -- the end -------------------------------------------------------------------------------------------------------

    def finished(self) -> EvaluationReport | None:
        """The result of an earlier start; None while there is none.

        Raises:
            ConfigError: it was an evaluation of other rows or of other weights: a file has changed since.
        """
        found = EvaluationReport.read(self.directory.path)
        if found is None:
            return None
        report, told = found
        with suppress(DataError):  # the rows may be gone; the result is not
            fingerprint = open_evaluation_rows(self.config, self.directory.path / "data").fingerprint
            if fingerprint != told["data_fingerprint"]:
                what = f"{self.config.dataset!r} has changed since the evaluation in {self.directory.path} ended."
                raise ConfigError([Problem("dataset", what, "Restore it, or use a new log_path.")])
        for role, fingerprint in told.get("model_fingerprints", {}).items():
            name = self.config.models[role]
            if HUB_NAME.fullmatch(name) and not Path(name).is_dir():
                continue  # it may have to be downloaded first
            with suppress(ModelError, CheckpointError):  # the model may be gone; the result is not
                if self.weights(role) != fingerprint:
                    what = f"the weights of {name!r} have changed since the evaluation in {self.directory.path} ended."
                    raise ConfigError([Problem(role, what, "Restore them, or use a new log_path.")])
        return report

    def results(self) -> list[RowResult]:
        """Every row with all that was said to it, in file order."""
        answers, losses = {}, {}
        for role in self.config.models:
            with self.answer_file(role) as file:
                answers[role] = file.answers
            losses[role] = {loss.index: loss for loss in self.losses(role) or []}
        samples = range(self.config.samples_per_row if self.config.wants_answers else 0)
        return [
            RowResult(
                index=row.index,
                prompt=str(row.messages[-1]["content"]),
                reference=None if row.reference is None else row.reference.text,
                answers={role: [found[row.index, sample] for sample in samples] for role, found in answers.items()},
                losses={role: found[row.index] for role, found in losses.items() if row.index in found},
                wins=tuple(self.wins[place]) if self.wins else (),
            )
            for place, row in enumerate(self.data.rows[MODEL])
        ]

    def finish(self) -> EvaluationReport:
        """Release what is left, record the result, show it."""
        self.release()
        path, run_id = self.directory.path, self.directory.run_id
        versions = {role: next(iter(self.versions(role)), "") for role in self.config.models}
        report = make_report(
            self.config, run_id, path, self.results(), same_tokens=self.data.same_tokens, versions=versions
        )
        with self.directory.guard():
            extra: dict[str, Any] = {"config": self.config.numbers(), "data_fingerprint": self.data.fingerprint}
            extra["model_fingerprints"] = {role: self.weights(role) for role in self.config.models}
            for role, model in self.config.models.items():
                if self.config.deployment_of(role).deployment_id is None:  # an adopted one may serve other weights
                    add_evaluation(self.env.home, model, role, {**report.to_dict(), **extra})
            report.write(path, extra)
        self._track(report)
        show_table(report.rows(SHOWN_ROWS), key=f"answers-{run_id}", description="Rows side by side")
        show_report(report.to_markdown(), key=f"report-{run_id}", description="Report")
        return report

    def release(self) -> None:
        """Delete what was deployed; an adopted deployment stays."""
        try:
            self._close_sampler()
        finally:
            # Also what an earlier start left behind that was killed, when this one had nothing to ask.
            if any(record.state != "freed" for record in self.ledger.all()):
                release_deployments(self.control, self.ledger)

    def disconnect(self) -> None:
        """Close the connections to the backend: the last thing that is done with an evaluation."""
        if self._control is not None:
            self._control.close()

    def fail(self) -> None:
        """Free what is deployed. Never raises: the error at hand matters more. Ctrl-C does not break it off."""
        with undisturbed():
            try:
                self.release()
            except Exception as problem:
                self._tell_left(problem)

    def _tell_left(self, problem: Exception) -> None:
        left = [record.resource_id for record in self.ledger.all() if record.state != "freed"]
        if self.config.deployment.replica_count is None:
            ends = "the backend frees their hardware when nobody asks them anything"
        else:
            ends = f"with deployment.replica_count={self.config.deployment.replica_count} they run until then"
        logger.warning(
            "not everything could be released: %s. Deployments that are left: %s. The same evaluation, started again "
            "with log_path %s, deletes them; %s.",
            problem,
            ", ".join(left) or "none",
            self.directory.path,
            ends,
        )

    def _close_sampler(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()

    def _track(self, report: EvaluationReport) -> None:
        """Numbers and answers for W&B, where it is on."""
        shown = self.config.model_dump(mode="json")
        directory = self.directory
        sink = WandbSink(
            self.config.wandb,
            self.env,
            log_path=directory.path,
            run_id=directory.run_id,
            epoch=directory.epoch,
            shown=shown,
        )
        sink.start(Start(0, 0, {}))
        sink.log_table("evaluation/answers", report.rows(WANDB_ROWS))
        sink.end(report.evaluation, failed=False)


@contextmanager
def open_evaluation(config: EvaluationConfig) -> Iterator[EvalRun]:
    """Own the run directory of `config`, and free everything at the end, whatever happens.

    Raises:
        LeaseLost: another process owns it.
        ConfigError: it holds the result of an evaluation with another config, or a run of a recipe.
    """
    env = environment()
    contents = config.model_dump(mode="json")
    _check_same(config, Path(config.log_path).expanduser().resolve())
    with RunDirectory.open(config.log_path, recipe=config.recipe, config=contents, home=env.home) as directory:
        run = EvalRun(config, directory, env)
        try:
            yield run
        except BaseException:
            run.fail()
            raise
        finally:
            run.disconnect()


def _snapshot(version: str) -> str:
    return f"snapshot {version}" if version else "the model that it was made of"


def _check_same(config: EvaluationConfig, path: Path) -> None:
    told = read_json(path / EVALUATION_FILE)
    if told is None:
        return
    old, new = told["config"], config.numbers()
    problems = [
        Problem(name, f"is {new.get(name)!r}, but {path} has the result for {old.get(name)!r}.", "")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if problems:
        raise ConfigError([*problems, Problem("log_path", "is that of another evaluation.", "Use another one.")])
