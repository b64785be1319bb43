"""Getting the trainers and the deployment of a run: found again by their ids, or made."""

from __future__ import annotations

import time
from typing import Any

from cookbook.deadlines import Deadline
from cookbook.deployments import provision_deployment as deploy
from cookbook.provisioning import provision_reference as provision_other
from cookbook.provisioning import provision_trainer as provision
from cookbook.provisioning import release_reference
from cookbook.reference import open_reference
from tasks.preference_run import DPORun
from tasks.record import RecordedTask, recorded
from tasks.rl_run import RLRun
from tasks.run import Run

__all__ = ["provision_dpo", "provision_rl", "provision_trainer"]


@recorded(deadline=lambda config: config.infra.trainer_timeout_s, retried=True, persist=True)
def provision_trainer(run: Run) -> dict[str, str]:
    """Provision the policy trainer within one deadline over waiting for capacity and starting; return its identity.

    The body runs again on a retried flow run: the resource id makes it idempotent, and a trainer that died meanwhile is
    noticed, which a cached result would not tell.

    Raises:
        ProvisioningError: the trainer failed, or was not ready in time.
    """
    started = time.monotonic()
    run.trainer = provision(
        run.control, run.ledger, run.config, role="policy", deadline=Deadline(run.config.infra.trainer_timeout_s)
    )
    run.say(f"trainer {run.trainer.job_id} is ready ({time.monotonic() - started:.1f} s)")
    return {"job_id": run.trainer.job_id, "generation": str(run.trainer.generation)}


@recorded(deadline=lambda config: config.infra.trainer_timeout_s, retried=True, persist=True)
def provision_reference(run: RLRun | DPORun) -> dict[str, str]:
    """Provision the reference trainer, as `provision_trainer` does; {} where the run needs none of its own."""
    started = time.monotonic()
    deadline = Deadline(run.config.infra.trainer_timeout_s)
    run.reference_trainer = provision_other(run.control, run.ledger, run.config, deadline=deadline)
    if run.reference_trainer is None:
        return {}
    run.say(f"reference trainer {run.reference_trainer.job_id} is ready ({time.monotonic() - started:.1f} s)")
    return {"job_id": run.reference_trainer.job_id, "generation": str(run.reference_trainer.generation)}


@recorded(deadline=lambda config: config.deployment.deployment_timeout_s, retried=True, persist=True)
def provision_deployment(run: RLRun | DPORun) -> dict[str, str]:
    """Provision the deployment that samples, within its own deadline; return its identity.

    Raises:
        ProvisioningError: the deployment failed, or was not ready in time.
    """
    started = time.monotonic()
    run.deployment = deploy(
        run.control,
        run.ledger,
        run.config,
        trainer=run.trainer,
        run_id=run.directory.run_id,
        deadline=Deadline(run.config.deployment.deployment_timeout_s),
    )
    run.say(f"deployment {run.deployment.deployment_id} is ready ({time.monotonic() - started:.1f} s)")
    return {"deployment_id": run.deployment.deployment_id, "generation": str(run.deployment.generation)}


def provision_rl(run: RLRun) -> None:
    """Policy trainer, reference trainer and deployment, side by side; then the session with the reference.

    Raises:
        ProvisioningError: one of them could not be had; the others are released with the run.
    """
    run.control.account_id()  # before the threads, which share it
    tasks: list[RecordedTask[Any, [], Any]] = [provision_trainer, provision_deployment]
    if run.config.needs_reference_trainer:
        tasks.append(provision_reference)
    run.records.side_by_side(tasks, run)
    assert run.trainer is not None
    run.reference = open_reference(
        run.control.jobs,
        run.config,
        run.trainer,
        run.reference_trainer,
        user_metadata=run.directory.user_metadata(),
    )
    if run.reference is not None:
        run.closed_at_end(run.reference)


def provision_dpo(run: DPORun) -> None:
    """Policy trainer; a reference trainer while its logprobs are not all known; a deployment where weights are synced.

    Raises:
        ProvisioningError: one of them could not be had; the others are released with the run.
    """
    run.control.account_id()  # before the threads, which share it
    tasks: list[RecordedTask[Any, [], Any]] = [provision_trainer]
    if run.cache_is_complete:
        release_reference(run.control, run.ledger)  # an earlier start may have died before it did
    elif run.config.needs_reference_trainer:
        tasks.append(provision_reference)
    if run.config.has_deployment:
        tasks.append(provision_deployment)
    run.records.side_by_side(tasks, run)
