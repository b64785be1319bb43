"""The deployments of a run: found again by the id in the run's ledger, or made; adopted where the config names one.

There are two kinds: one that hot loads from the policy's trainer, and one of any model without a trainer. The ledger is
written before anything is created. A deployment holds nothing that a run needs again, as the snapshots stay with the
trainer job, so one that has failed or stopped is followed by the next generation. Which weights it serves is decided
in cookbook/weight_sync.py.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from fireworks.training.sdk import DeploymentConfig

from cookbook.config import DeployConfig, DeployedConfig, RLConfig
from cookbook.control_plane import CALL_TIMEOUT_S, ControlPlane, Deployment
from cookbook.deadlines import MIN_CALL_S, Deadline
from cookbook.deployment_request import (
    ROLE,
    ServedModel,
    deployment_id_of,
    deployment_request,
    request_fingerprint,
)
from cookbook.deployment_state import DELETED, FAILED, is_scaled_to_zero, status_of, wait_until_ready
from cookbook.errors import ConfigError, Problem, ProvisioningError
from cookbook.ledger import ResourceLedger, ResourceRecord
from cookbook.provisioning import LANDING_PAUSE_S, LANDING_S, TrainerHandle, wire_model
from cookbook.recovery import CALLER_STATUSES, REFUSED_STATUSES

__all__ = [
    "DeploymentHandle",
    "attach_trainer",
    "deploy_model",
    "provision_deployment",
    "release_deployments",
]

_NOT_MADE = (REFUSED_STATUSES | CALLER_STATUSES) - {409}  # one that is there already
_FIRST_PAUSE_S = 0.1
_ATTACH_POLL_S = 2.0
_TRAINER_WAIT_S = 60.0  # for the trainer job to be created by another thread; it need not be ready

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeploymentHandle:
    """A deployment that is ready."""

    deployment_id: str
    name: str
    """Resource name, accounts/<account>/deployments/<id>."""
    model: str
    """What a completion request names as its `model`."""
    base_model: str
    """The base model by the name that the backend knows it under."""
    adopted: bool
    """The config named it: it is never deleted."""
    generation: int
    """1, 2, ...; 0 for one that was adopted."""


@dataclass(frozen=True)
class _Wanted:
    """A deployment of the run's own, as it is asked for."""

    role: str
    request: DeploymentConfig
    """What to ask the backend for, without an id and a trainer job."""
    spec: str
    """Fingerprint of what was asked for."""
    trainer_job: Callable[[], str | None]
    """Resource name of the trainer job to hot load from, when the deployment is made. May wait for it."""
    probed: bool
    """Whether it is ready only once it answers: one that scales to zero says READY without a replica."""


def provision_deployment(
    control: ControlPlane,
    ledger: ResourceLedger,
    config: DeployedConfig,
    *,
    trainer: TrainerHandle | None,
    run_id: str,
    deadline: Deadline,
) -> DeploymentHandle:
    """Have a ready deployment that hot loads from the policy's trainer job: the one that the config names, the one the
    run has, else the next generation.

    One deadline holds over creating and starting. Calling it again, also from another process after this one was
    killed, finds the same deployment.

    Args:
        ledger: the run's resources.
        config: `base_model` and `deployment`. A changed `deployment` block gives a new deployment.
        trainer: the policy's. None = another thread is provisioning it: its job id is taken from the ledger as soon as
            it was created, and `attach_trainer` must follow once it is ready.
        run_id: part of the deployment's id.
        deadline: of all of it; `deployment.deployment_timeout_s` from the start.

    Raises:
        ProvisioningError: the deployment failed (with the backend's message), was deleted meanwhile, or is late.
        ModelError, ConfigError: the base model or what `deployment` asks for cannot be had.
        LeaseLost: another process owns the run.
    """
    base_model = wire_model(config.base_model, control.backend, control.models_dir)
    if config.deployment.deployment_id is not None:
        handle = _adopt(control, config.deployment.deployment_id, base_model, deadline)
    else:
        request = deployment_request(control, config.deployment, base_model, config.infra.training_shape_id, deadline)
        wanted = _Wanted(
            role=ROLE,
            request=request,
            spec=request_fingerprint(request, config.deployment.deployment_shape or config.infra.training_shape_id),
            trainer_job=lambda: _job_name(control, ledger, config, trainer, deadline),
            probed=False,
        )
        handle = _own(control, ledger, wanted, run_id, deadline)
    if trainer is not None:
        attach_trainer(control, handle, trainer.job_name, deadline)
    return handle


def deploy_model(
    control: ControlPlane,
    ledger: ResourceLedger,
    model: ServedModel,
    deployment: DeployConfig,
    *,
    run_id: str,
    role: str = "deployment",
    deadline: Deadline,
    training_shape_id: str | None = None,
) -> DeploymentHandle:
    """Have a ready deployment of any model (base, promoted full model, promoted LoRA adapter), without a trainer: the
    one that `deployment` names, the one the run has in this role, else the next generation.

    The ledger's rules are those of `provision_deployment`. A run may have several, each in a role of its own. Unless
    `deployment.replica_count` pins it, the backend frees the hardware of one that nobody asks anything.

    Args:
        ledger: the run's resources; `release_deployments` deletes what was made.
        model: what `served_model` found.
        deployment: where and how. A changed one gives a new deployment.
        run_id: part of the deployment's id.
        role: what it is to the run, in a-z, 0-9 and "-"; part of its id.
        deadline: of all of it.
        training_shape_id: whose deployment shape to use where `deployment` names neither shape nor accelerator.

    Raises:
        ProvisioningError: the deployment failed (with the backend's message), was deleted meanwhile, or is late.
        ConfigError: what `deployment` asks for cannot be had.
        LeaseLost: another process owns the run, or it is ending.
    """
    if deployment.deployment_id is not None:
        return _adopt(control, deployment.deployment_id, model.name, deadline)
    shape = deployment.deployment_shape or training_shape_id
    if control.backend != "embedded" and not shape and deployment.deployment_accelerator_type is None:
        what = f"neither deployment_shape nor deployment_accelerator_type is set, with backend {control.backend!r}."
        raise ConfigError([Problem("deployment", what, "Set deployment.deployment_shape.")])
    request = dataclasses.replace(
        deployment_request(control, deployment, model.name, training_shape_id, deadline),
        min_replica_count=deployment.replica_count or 0,
        hot_load_bucket_type=None,
        hot_load_transition_type=None,
        enable_hot_load=False,
        for_training=False,
        extra_values={**(deployment.extra_values or {}), **model.extra_values} or None,
    )
    wanted = _Wanted(role, request, request_fingerprint(request, shape), trainer_job=lambda: None, probed=True)
    return _own(control, ledger, wanted, run_id, deadline)


def attach_trainer(control: ControlPlane, deployment: DeploymentHandle, job_name: str, deadline: Deadline) -> None:
    """Let a deployment take its snapshots from this trainer job. Nothing happens when it does so already.

    Raises:
        ProvisioningError: the backend refused, or the deployment was not ready again in time.
    """
    seconds = deadline.for_call(MIN_CALL_S)
    control.call(
        f"attaching deployment {deployment.deployment_id} to {job_name}",
        lambda: control.deployments.reattach_trainer(
            deployment.deployment_id,
            base_model=deployment.base_model,
            trainer_job_name=job_name,
            timeout_s=seconds,
            poll_interval_s=_ATTACH_POLL_S,
        ),
        seconds,
    )


def release_deployments(
    control: ControlPlane,
    ledger: ResourceLedger,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
    landing_s: float = LANDING_S,
) -> bool:
    """Delete a run's own deployments: a run that goes on makes the next one. An adopted one is not in the ledger.

    One that was asked for, but never confirmed, may come yet: the request is on its way. Where it does not show within
    `landing_s`, its record stays "intended", for whoever frees the run's resources next.

    Args:
        timeout_s: for each of them.
        landing_s: for all of them together.

    Returns:
        Whether all are deleted.

    Raises:
        LeaseLost: another process owns the run, and may be using the deployments. Nothing was done.
        ProvisioningError: the backend did not do it.
    """
    ledger.check_lease()
    landing = Deadline(landing_s)
    left = [record for record in ledger.all() if record.kind == "deployment" and record.state != "freed"]
    problems: list[ProvisioningError] = []
    while True:
        for record in tuple(left):
            try:
                if control.delete_deployment(record.resource_id, timeout_s) or record.state == "confirmed":
                    ledger.freed(record)
                    left.remove(record)
            except ProvisioningError as problem:  # the others are freed all the same
                problems.append(problem)
        if problems:
            raise problems[0]
        if not left or landing.expired:
            return not left
        time.sleep(LANDING_PAUSE_S)


def _own(
    control: ControlPlane, ledger: ResourceLedger, wanted: _Wanted, run_id: str, deadline: Deadline
) -> DeploymentHandle:
    base_model = wanted.request.base_model
    record, found = ledger.current(wanted.role), None
    if record is not None and record.state != "freed":
        found = control.deployment(record.resource_id, deadline.for_call(MIN_CALL_S))
        if not _is_usable(record, found, wanted.spec):
            record, found = _discard(control, ledger, record, found, deadline), None
    if record is None or record.state == "freed":
        generation = 1 if record is None else record.generation + 1
        name = deployment_id_of(base_model, run_id, generation, wanted.role)
        record = ledger.intend("deployment", wanted.role, generation, wanted.spec, resource_id=name)
    if found is None:
        _create(control, ledger, record, wanted, deadline)
    if record.state == "intended":
        record = ledger.confirm(record)
    ready = wait_until_ready(control, record.resource_id, deadline, probed=wanted.probed or found is not None)
    if ready["state"] in (FAILED, *DELETED):
        if found is None:
            what = f"deployment {record.resource_id} is {ready['state']}: {status_of(ready)}"
            raise ProvisioningError(f"{what}. The next attempt makes another one.")
        return _own(control, ledger, wanted, run_id, deadline)  # it has died meanwhile
    return _handle(control, record.resource_id, ready, base_model, deadline, generation=record.generation)


def _adopt(control: ControlPlane, deployment_id: str, base_model: str, deadline: Deadline) -> DeploymentHandle:
    """Use a deployment that is not this run's own, and never delete it."""
    where = "deployment.deployment_id"
    deployment = control.deployment(deployment_id, deadline.for_call(MIN_CALL_S))
    if deployment is None:
        what = f"there is no deployment {deployment_id!r} to adopt."
        raise ConfigError([Problem(where, what, "Create it, or leave deployment_id out: the run then makes its own.")])
    served = deployment.get("baseModel") or base_model
    if served != base_model:
        what = f"deployment {deployment_id!r} serves {served}, base_model is {base_model}."
        raise ConfigError([Problem(where, what, "Name a deployment of the same model, or leave deployment_id out.")])
    ready = deployment
    if not is_scaled_to_zero(deployment):
        ready = wait_until_ready(control, deployment_id, deadline, probed=True)
    if ready["state"] in (FAILED, *DELETED) or is_scaled_to_zero(ready):
        state = "scaled to zero" if is_scaled_to_zero(ready) else ready["state"]
        raise ProvisioningError(
            f"{where}: deployment {deployment_id!r} is {state}: {status_of(ready)}. Bring it back, or leave "
            "deployment_id out: the run then makes its own."
        )
    return _handle(control, deployment_id, ready, base_model, deadline, generation=0)


def _handle(
    control: ControlPlane,
    deployment_id: str,
    deployment: Deployment,
    base_model: str,
    deadline: Deadline,
    *,
    generation: int,
) -> DeploymentHandle:
    model = f"accounts/{control.account_id(deadline.for_call(MIN_CALL_S))}/deployments/{deployment_id}"
    name = deployment.get("name") or model
    return DeploymentHandle(deployment_id, name, model, base_model, adopted=generation == 0, generation=generation)


def _create(
    control: ControlPlane, ledger: ResourceLedger, record: ResourceRecord, wanted: _Wanted, deadline: Deadline
) -> None:
    """Ask for the deployment of a record, which is freed at once when the backend says no: nothing can come any more.

    After any other failure it may.
    """
    name, refusals = record.resource_id, []
    named = dataclasses.replace(wanted.request, deployment_id=name, hot_load_trainer_job=wanted.trainer_job())

    def create() -> None:
        try:
            control.deployments.create_or_get(named)
        except httpx.HTTPStatusError as error:
            refusals.append(error.response.status_code)
            raise

    ledger.check_lease()  # waiting for the trainer takes a while, and the run may have ended
    try:
        control.call(f"creating deployment {name}", create, deadline.for_call(MIN_CALL_S))
    except ProvisioningError:
        if any(status in _NOT_MADE for status in refusals):
            ledger.freed(record)
        raise


def _job_name(
    control: ControlPlane,
    ledger: ResourceLedger,
    config: DeployedConfig,
    trainer: TrainerHandle | None,
    deadline: Deadline,
) -> str:
    """Resource name of the policy's trainer job, as soon as it exists."""
    if trainer is not None:
        return trainer.job_name
    job_id = config.policy_job_id if isinstance(config, RLConfig) else None
    wait = Deadline(min(_TRAINER_WAIT_S, deadline.remaining()))
    while job_id is None:
        record = ledger.current("policy")
        if record is not None and record.state == "confirmed":
            job_id = record.resource_id
        elif wait.expired:
            raise ProvisioningError(
                f"no trainer job was created for the policy within {wait.seconds:.0f} s, and a deployment hot loads "
                "from one. Provision the trainer before the deployment, or beside it."
            )
        else:
            time.sleep(_FIRST_PAUSE_S)
    return f"accounts/{control.account_id(deadline.for_call(MIN_CALL_S))}/rlorTrainerJobs/{job_id}"


def _is_usable(record: ResourceRecord, deployment: Deployment | None, spec: str) -> bool:
    """Whether the newest deployment of the run is, or can become, the one asked for."""
    if record.spec != spec:
        return False
    if deployment is None:
        return record.state == "intended"  # the process died before it could create it
    return deployment["state"] not in (FAILED, *DELETED) and not is_scaled_to_zero(deployment)


def _discard(
    control: ControlPlane,
    ledger: ResourceLedger,
    record: ResourceRecord,
    deployment: Deployment | None,
    deadline: Deadline,
) -> ResourceRecord:
    """Free a deployment that will not be used again."""
    logger.info("deployment %s is gone, has failed, or is not what the config asks for", record.resource_id)
    if deployment is not None and deployment["state"] not in DELETED:
        control.delete_deployment(record.resource_id, deadline.for_call(MIN_CALL_S))
    return ledger.freed(record)
