"""The trainer of a run: found again by the id in the run's ledger, resumed, or made; adopted where the config names it.

The ledger is written before anything is created, so what a killed process left behind is found by the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from fireworks.training.sdk import TrainerJobConfig

from cookbook.config import DPOConfig, RecipeConfig, RLConfig
from cookbook.control_plane import CALL_TIMEOUT_S, ControlPlane, Job, connect
from cookbook.deadlines import MIN_CALL_S, Deadline
from cookbook.errors import ConfigError, Problem, ProvisioningError
from cookbook.ledger import ResourceLedger, ResourceRecord
from cookbook.models.folders import resolve_model
from cookbook.promotion import PromotedModel, promote

__all__ = [
    "DELETED",
    "LANDING_PAUSE_S",
    "LANDING_S",
    "STOPPED",
    "STOPPING",
    "ControlPlane",
    "PromotedModel",
    "TrainerHandle",
    "connect",
    "promote",
    "provision_reference",
    "provision_trainer",
    "release_reference",
    "release_trainers",
    "wire_model",
]

RUNNING = "JOB_STATE_RUNNING"
FAILED = "JOB_STATE_FAILED"
STOPPED = (FAILED, "JOB_STATE_CANCELLED", "JOB_STATE_PAUSED", "JOB_STATE_COMPLETED", "JOB_STATE_EARLY_STOPPED")
STOPPING = "JOB_STATE_CANCELLING"
DELETED = ("JOB_STATE_DELETING", "JOB_STATE_DELETED", "JOB_STATE_ARCHIVED")

LANDING_S = 5.0
"""How long a release waits for what was asked for and has not come: the request may still be on its way."""
LANDING_PAUSE_S = 0.2

_GONE: Job = {"state": "JOB_STATE_DELETED", "statusMessage": "there is no such job"}
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_RESUME_GRACE_S = 30.0  # how long a job may still show the state from before its resume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerHandle:
    """A trainer that is ready."""

    job_id: str
    job_name: str
    base_url: str
    """Where the trainer itself answers."""
    base_model: str
    """The base model by the name that the backend knows it under."""
    max_context_length: int | None
    """Tokens a sequence may have; None = the backend does not say."""
    generation: int
    """0 for a trainer that was adopted."""
    lora_rank: int = 0
    """Rank of the adapters that the job trains; 0 = full parameter, or the backend does not say."""
    adopted: bool = False
    """It was not made for this run, which never stops or deletes it."""


def wire_model(base_model: str, backend: str, models_dir: Path, *, adapters: bool = False) -> str:
    """The name of a base model on the wire.

    Args:
        base_model: as in the config.
        backend: "embedded": a model below `models_dir` becomes accounts/local/models/<id>, any other the absolute path
            of its folder. "fireworks": a resource name, unchanged.
        adapters: a LoRA adapter will do, as for `resolve_model`.

    Raises:
        ModelError: no such model on this machine.
        ConfigError: not a resource name.
    """
    if backend == "embedded":
        folder = resolve_model(base_model, models_dir, adapters=adapters)
        is_known_by_name = folder.parent == models_dir.resolve()
        return f"accounts/local/models/{folder.name}" if is_known_by_name else str(folder)
    if not base_model.startswith("accounts/"):
        what = f"{base_model!r} is not a model resource, and backend is {backend!r}."
        where = "model" if adapters else "base_model"
        raise ConfigError([Problem(where, what, "Write accounts/<account>/models/<model>.")])
    return base_model


def provision_trainer(
    control: ControlPlane,
    ledger: ResourceLedger,
    config: RecipeConfig,
    *,
    role: str = "policy",
    forward_only: bool = False,
    deadline: Deadline,
) -> TrainerHandle:
    """Have a ready trainer for a run: the one it has, resumed if it stopped, else the next generation.

    One deadline holds over waiting for capacity and starting. Calling it again, also from another process after this
    one was killed, finds the same trainer. A trainer that the config names (`policy_job_id`, `reference_job_id`) is
    used as it is, resumed at most, and never in the ledger.

    Args:
        ledger: the run's resources.
        config: what to train, and `infra`. A changed `infra` gives a new trainer.
        role: "policy" or "reference".
        forward_only: a trainer that cannot train.
        deadline: of all of it; `infra.trainer_timeout_s` from the start.

    Raises:
        ProvisioningError: the trainer failed (with the backend's message), was deleted meanwhile, or is late.
        ModelError, ConfigError: the base model or the context length cannot be had.
        LeaseLost: another process owns the run.
    """
    base_model = wire_model(config.base_model, control.backend, control.models_dir)
    job_id, url = _named_by(config, role)
    if job_id is not None:
        return _adopt(control, config, role, job_id, url, base_model, deadline)
    request = _request(control, config, base_model, role, forward_only, deadline)
    spec = _fingerprint(request, config, role)
    record, job = ledger.current(role), None
    if record is not None and record.state != "freed":
        job = control.job(record.resource_id, deadline.for_call(MIN_CALL_S))
        if not _is_usable(record, job, spec):
            record, job = _discard(control, ledger, record, job, deadline), None
    if record is None or record.state == "freed":
        record = ledger.intend("trainer", role, 1 if record is None else record.generation + 1, spec)
    before = None
    ledger.check_lease()  # from here on something is done to a trainer, and only its owner may
    if job is None:
        named = dataclasses.replace(request, requested_job_id=record.resource_id, display_name=record.resource_id)
        control.call(
            f"creating trainer {record.resource_id}", lambda: control.jobs.create(named), deadline.for_call(MIN_CALL_S)
        )
    elif job["state"] in (*STOPPED, STOPPING):
        before = _stopped(control, record.resource_id, job, deadline)
        logger.info("trainer %s is %s (%s): resuming it", record.resource_id, before["state"], _status_of(before))
        if control.resume(record.resource_id, deadline.for_call(MIN_CALL_S)) is None:
            _discard(control, ledger, record, before, deadline)
            return provision_trainer(control, ledger, config, role=role, forward_only=forward_only, deadline=deadline)
    if record.state == "intended":
        record = ledger.confirm(record)
    url = control.trainer_url(record.resource_id, deadline.for_call(MIN_CALL_S))
    found = job is not None and before is None
    ready = _wait_until_ready(control, record.resource_id, url, before, deadline, found=found)
    if ready is None:
        return provision_trainer(control, ledger, config, role=role, forward_only=forward_only, deadline=deadline)
    return _handle(ready, record.resource_id, url, base_model, record.generation)


def provision_reference(
    control: ControlPlane, ledger: ResourceLedger, config: RLConfig | DPOConfig, *, deadline: Deadline
) -> TrainerHandle | None:
    """Have the reference trainer of a run, as `provision_trainer` does; None where the run needs none of its own.

    The base model under a LoRA adapter needs none: the policy's trainer serves it. RL needs one for a KL term against
    a reference that the config names, by its shape or by its job; DPO with full parameters always, on
    `infra.ref_training_shape_id`, else where the policy is: on its shape, or with its hardware.

    Raises:
        ProvisioningError, ModelError, ConfigError, LeaseLost: as for `provision_trainer`.
    """
    if not config.needs_reference_trainer:
        return None
    return provision_trainer(control, ledger, config, role="reference", forward_only=True, deadline=deadline)


def release_reference(control: ControlPlane, ledger: ResourceLedger) -> None:
    """Delete a run's reference trainer, and only that one. Nothing happens where the run has none of its own.

    `provision_reference` makes the next generation, should the run need it again.

    Raises:
        LeaseLost: another process owns the run, and may be using the trainer. Nothing was done.
        ProvisioningError: the backend did not do it.
    """
    ledger.check_lease()
    record = ledger.current("reference")
    if record is None or record.state == "freed":
        return
    control.delete(record.resource_id)
    ledger.freed(record)


def release_trainers(
    control: ControlPlane,
    ledger: ResourceLedger,
    *,
    delete: bool,
    timeout_s: float = CALL_TIMEOUT_S,
    landing_s: float = LANDING_S,
) -> None:
    """Give the hardware of a run's trainers back: deleted when the run is over, else cancelled, to be resumed. Their
    checkpoints stay. Nothing is done to an adopted one, which is not in the ledger.

    One that was asked for, but never confirmed, may come yet: the request is on its way. Where it does not show within
    `landing_s`, its record stays "intended", for whoever frees the run's resources next.

    Args:
        timeout_s: for each of them.
        landing_s: for all of them together.

    Raises:
        LeaseLost: another process owns the run, and may be using the trainers. Nothing was done.
        ProvisioningError: the backend did not do it.
    """
    ledger.check_lease()
    landing = Deadline(landing_s)
    left = [record for record in ledger.all() if record.kind == "trainer" and record.state != "freed"]
    problems: list[ProvisioningError] = []
    while True:
        for record in tuple(left):
            try:
                if record.state == "intended" and control.job(record.resource_id, timeout_s) is None:
                    continue
                left.remove(record)
                if delete:
                    control.delete(record.resource_id, timeout_s)
                    ledger.freed(record)
                else:
                    control.cancel(record.resource_id, timeout_s)
            except ProvisioningError as problem:  # the others are freed all the same
                problems.append(problem)
        if problems:
            raise problems[0]
        if not left or landing.expired:
            return
        time.sleep(LANDING_PAUSE_S)


def _request(
    control: ControlPlane, config: RecipeConfig, base_model: str, role: str, forward_only: bool, deadline: Deadline
) -> TrainerJobConfig:
    """What to ask the backend for, without an id."""
    infra = config.infra
    common = {
        "base_model": base_model,
        "lora_rank": 0 if role == "reference" else config.lora_rank,
        "learning_rate": config.learning_rate,
        "forward_only": forward_only,
        "region": infra.region,
        "extra_args": infra.extra_args,
        "purpose": infra.purpose,
    }
    shape = _shape_of(config, role)
    if shape is None:
        return TrainerJobConfig(
            **common,
            max_context_length=config.max_seq_len,
            accelerator_type=infra.accelerator_type,
            accelerator_count=infra.accelerator_count,
            node_count=infra.node_count,
            custom_image_tag=infra.custom_image_tag,
        )
    profile = control.shape(shape, deadline.for_call(MIN_CALL_S))
    longest = profile.max_supported_context_length
    if config.max_seq_len is not None and config.max_seq_len > longest:
        what = f"is {config.max_seq_len}, but training shape {shape} supports at most {longest} tokens."
        raise ConfigError([Problem("max_seq_len", what, "Lower it, or leave it out.")])
    return TrainerJobConfig(**common, training_shape_ref=profile.training_shape_version)


def _shape_of(config: RecipeConfig, role: str) -> str | None:
    infra = config.infra
    if role != "reference":
        return infra.training_shape_id
    own = infra.training_shape_id if isinstance(config, DPOConfig) else None
    return infra.ref_training_shape_id or own


def _fingerprint(request: TrainerJobConfig, config: RecipeConfig, role: str = "policy") -> str:
    """What was asked for. The shape as the config names it: a new version of it does not make a trainer wrong."""
    values = dataclasses.asdict(request) | {"training_shape_ref": _shape_of(config, role)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _is_usable(record: ResourceRecord, job: Job | None, spec: str) -> bool:
    """Whether the newest resource of a role is, or can become, the trainer asked for."""
    if record.spec != spec:
        return False
    if job is None:
        return record.state == "intended"  # the process died before it could create it
    return job["state"] not in DELETED


def _discard(
    control: ControlPlane, ledger: ResourceLedger, record: ResourceRecord, job: Job | None, deadline: Deadline
) -> ResourceRecord:
    """Free a trainer that will not be used again."""
    ledger.check_lease()
    logger.info("trainer %s is gone, cannot be resumed, or is not what the config asks for", record.resource_id)
    if job is not None and job["state"] not in DELETED:
        control.delete(record.resource_id, deadline.for_call(MIN_CALL_S))
    return ledger.freed(record)


def _named_by(config: RecipeConfig, role: str) -> tuple[str | None, str | None]:
    """Job id and URL of the trainer that the config wants adopted for a role."""
    if not isinstance(config, RLConfig):
        return None, None
    if role == "reference":
        return config.reference_job_id, config.reference_base_url
    return config.policy_job_id, config.policy_base_url


def _adopt(
    control: ControlPlane,
    config: RecipeConfig,
    role: str,
    job_id: str,
    url: str | None,
    base_model: str,
    deadline: Deadline,
) -> TrainerHandle:
    """Use a trainer that is not this run's own. It is resumed if it has stopped, and left as it is otherwise."""
    job = control.job(job_id, deadline.for_call(MIN_CALL_S))
    if job is None or job["state"] in DELETED:
        state = "does not exist" if job is None else f"is {job['state']}: {_status_of(job)}"
        raise ProvisioningError(f"{role}_job_id: trainer {job_id!r} {state}. Name another one, or leave it out.")
    _check_adopted(config, role, job_id, job, base_model)
    before = None
    if job["state"] in (*STOPPED, STOPPING):
        before = _stopped(control, job_id, job, deadline)
        logger.info("adopted trainer %s is %s (%s): resuming it", job_id, before["state"], _status_of(before))
        if control.resume(job_id, deadline.for_call(MIN_CALL_S)) is None:
            what = f"is {before['state']} ({_status_of(before)}) and cannot be resumed."
            raise ProvisioningError(f"{role}_job_id: trainer {job_id!r} {what} Name another one, or leave it out.")
    where = url or control.trainer_url(job_id, deadline.for_call(MIN_CALL_S))
    ready = _wait_until_ready(control, job_id, where, before, deadline, found=False)
    assert ready is not None, "None is only for trainers that were found in the ledger"
    return dataclasses.replace(_handle(ready, job_id, where, base_model, 0), adopted=True)


def _check_adopted(config: RecipeConfig, role: str, job_id: str, job: Job, base_model: str) -> None:
    """Refuse a trainer of another model, before anything is done to it."""
    given = job.get("trainingConfig") or {}
    problems = []
    if given.get("baseModel", base_model) != base_model:
        what = f"trainer {job_id!r} is of base model {given['baseModel']}, base_model is {base_model}."
        problems.append(Problem(f"{role}_job_id", what, "Name a trainer of the same model."))
    if role == "policy" and given.get("loraRank", config.lora_rank) != config.lora_rank:
        what = f"trainer {job_id!r} has LoRA rank {given['loraRank']}, lora_rank is {config.lora_rank}."
        problems.append(Problem(f"{role}_job_id", what, "Set lora_rank to the trainer's, or name another trainer."))
    if problems:
        raise ConfigError(problems)


def _handle(job: Job, job_id: str, url: str, base_model: str, generation: int) -> TrainerHandle:
    given = job.get("trainingConfig") or {}
    length, lora_rank = given.get("maxContextLength"), given.get("loraRank") or 0
    return TrainerHandle(job_id, job["name"], url, base_model, length, generation, lora_rank)


def _stopped(control: ControlPlane, job_id: str, job: Job, deadline: Deadline) -> Job:
    """The job once it has come to a stop."""
    while job["state"] == STOPPING:
        _pause(1.0, job_id, job, deadline)
        job = control.job(job_id, deadline.for_call(MIN_CALL_S)) or _GONE
    return job


def _wait_until_ready(
    control: ControlPlane,
    job_id: str,
    url: str,
    before: Job | None,
    deadline: Deadline,
    *,
    found: bool,
) -> Job | None:
    """Poll until the trainer runs and answers. `before` is the job as it was before it was resumed.

    None for a trainer that was `found`, neither made nor resumed by this call, and has stopped meanwhile.
    """
    grace = Deadline(_RESUME_GRACE_S)
    pause = _FIRST_PAUSE_S
    while True:
        job = control.job(job_id, deadline.for_call(MIN_CALL_S)) or _GONE
        is_stale = before is not None and not grace.expired and _moment(job) == _moment(before)
        if found and job["state"] in (*STOPPED, STOPPING, *DELETED):
            return None
        if job["state"] in (*STOPPED, *DELETED) and not is_stale:
            raise ProvisioningError(f"trainer {job_id} is {job['state']}: {_status_of(job)}")
        if job["state"] == RUNNING and control.is_healthy(url):
            return job
        _pause(pause, job_id, job, deadline)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)


def _pause(seconds: float, job_id: str, job: Job, deadline: Deadline) -> None:
    if deadline.expired:
        raise ProvisioningError(
            f"trainer {job_id} was not ready within infra.trainer_timeout_s={deadline.seconds:g} s: it is "
            f"{job['state']} ({_status_of(job)}). Raise infra.trainer_timeout_s, or start the run again to wait on."
        )
    time.sleep(min(seconds, deadline.remaining()))


def _moment(job: Job) -> tuple[str, str]:
    return job["state"], str(job.get("updateTime"))


def _status_of(job: Job) -> str:
    """The backend's own words about a job."""
    status = job.get("status")
    detail = status.get("message") if isinstance(status, dict) else status
    return str(job.get("statusMessage") or detail or job.get("message") or "the backend gives no reason")
