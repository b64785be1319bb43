"""What a trainer worker is told about its job: spec.json and the extra arguments in it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cookbook.backend.decoder import ComputeDtype, pick_compute_dtype
from cookbook.backend.paths import read_json
from cookbook.errors import BackendError

__all__ = ["JobSpec", "read_spec"]


@dataclass(frozen=True)
class JobSpec:
    """One trainer job. `base_model` is the name on the wire, `model_dir` its folder; `lora_rank` 0 = full parameter.

    `max_context_length` bounds a datum's tokens; `threads` is None for torch's own choice.
    """

    job_dir: Path
    job_id: str
    base_model: str
    model_dir: Path
    lora_rank: int
    max_context_length: int
    forward_only: bool
    inactivity_timeout_s: float
    checkpoints_dir: Path
    models_dir: Path
    compute_dtype: ComputeDtype
    threads: int | None


def read_spec(job_dir: Path) -> JobSpec:
    """Read job_dir/spec.json. BackendError when it cannot be read, lacks a field or has an unknown extra argument."""
    fields = read_json(job_dir / "spec.json")
    if fields is None:
        raise BackendError(f"{job_dir / 'spec.json'} is missing or not a JSON object: create the job again.")
    try:
        return _spec(job_dir, fields)
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{job_dir / 'spec.json'} is not a job spec: {error!r}. Create the job again.") from error


def _spec(job_dir: Path, fields: dict[str, Any]) -> JobSpec:
    extra = _parse_extra_args([str(argument) for argument in fields.get("extra_args") or []])
    return JobSpec(
        job_dir=job_dir,
        job_id=str(fields["job_id"]),
        base_model=str(fields["base_model"]),
        model_dir=Path(fields["model_dir"]),
        lora_rank=int(fields["lora_rank"]),
        max_context_length=int(fields["max_context_length"]),
        forward_only=bool(fields["forward_only"]),
        inactivity_timeout_s=float(fields["inactivity_timeout_s"]),
        checkpoints_dir=Path(fields["checkpoints_dir"]),
        models_dir=Path(fields["models_dir"]),
        compute_dtype=pick_compute_dtype() if extra.compute_dtype == "auto" else extra.compute_dtype,
        threads=extra.threads,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BackendError(f"extra_args: {message}. Known are --compute-dtype={{auto,float32,bfloat16}}, --threads=N.")


def _parse_extra_args(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="extra_args", add_help=False, allow_abbrev=False)
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=_positive, default=None)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
