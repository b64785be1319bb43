"""What a deployment worker is told about its deployment: spec.json and the extra arguments in it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cookbook.backend.decoder import ComputeDtype, pick_compute_dtype
from cookbook.backend.paths import read_json
from cookbook.errors import BackendError

__all__ = ["DeploymentSpec", "read_spec", "trainer_job_id"]

_TRAINER_JOB = re.compile(r"accounts/[^/]+/rlorTrainerJobs/([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True)
class DeploymentSpec:
    """One deployment. `base_model` is the name on the wire, `model_dir` its folder (a model, or a LoRA adapter on one),
    `base_dir` that of the model itself.

    `max_context_length` bounds prompt and completion together, in tokens. `trainer_job` is the id of the job whose
    snapshots are loaded, None when the deployment is linked to none (yet). `max_batch` sequences are computed at once,
    `max_waiting` more may queue. `threads` is None for torch's own choice.
    """

    folder: Path
    deployment_id: str
    account: str
    base_model: str
    model_dir: Path
    base_dir: Path
    max_context_length: int
    inactivity_timeout_s: float
    checkpoints_dir: Path
    trainer_job: str | None
    compute_dtype: ComputeDtype
    threads: int | None
    max_batch: int
    max_waiting: int

    @property
    def name(self) -> str:
        """The resource name, which clients send as `model`."""
        return f"accounts/{self.account}/deployments/{self.deployment_id}"


def read_spec(folder: Path) -> DeploymentSpec:
    """Read folder/spec.json. BackendError when it cannot be read, lacks a field or asks for what there is not here."""
    path = folder / "spec.json"
    fields = read_json(path)
    if fields is None:
        raise BackendError(f"{path} is missing or not a JSON object: create the deployment again.")
    try:
        return _spec(folder, fields)
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{path} is not a deployment's spec: {error!r}. Create the deployment again.") from error


def trainer_job_id(name: str) -> str:
    """The job id in `accounts/<account>/rlorTrainerJobs/<id>`. ValueError for anything else."""
    named = _TRAINER_JOB.fullmatch(name)
    if named is None:
        raise ValueError(f"{name!r} is not a trainer job: pass accounts/<account>/rlorTrainerJobs/<job id>.")
    return named.group(1)


def _spec(folder: Path, fields: dict[str, Any]) -> DeploymentSpec:
    if extra_values := fields.get("extra_values"):
        raise BackendError(
            f"extra_values has {sorted(extra_values)}: an embedded deployment takes its options from extra_args. "
            "Leave extra_values empty."
        )
    extra = _parse_extra_args([str(argument) for argument in fields.get("extra_args") or []])
    job = fields.get("hot_load_trainer_job")
    return DeploymentSpec(
        folder=folder,
        deployment_id=str(fields["deployment_id"]),
        account=str(fields["account"]),
        base_model=str(fields["base_model"]),
        model_dir=Path(fields["model_dir"]),
        base_dir=Path(fields["base_dir"]),
        max_context_length=int(fields["max_context_length"]),
        inactivity_timeout_s=float(fields["inactivity_timeout_s"]),
        checkpoints_dir=Path(fields["checkpoints_dir"]),
        trainer_job=trainer_job_id(job) if job else None,
        compute_dtype=pick_compute_dtype() if extra.compute_dtype == "auto" else extra.compute_dtype,
        threads=extra.threads,
        max_batch=extra.max_batch,
        max_waiting=extra.max_waiting,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BackendError(
            f"extra_args: {message}. Known are --compute-dtype={{auto,float32,bfloat16}}, --threads=N, --max-batch=N "
            "(sequences computed at once), --max-waiting=N (requests queued beyond those)."
        )


def _parse_extra_args(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="extra_args", add_help=False, allow_abbrev=False)
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=_positive, default=None)
    parser.add_argument("--max-batch", type=_positive, default=64)
    parser.add_argument("--max-waiting", type=_positive, default=1024)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
