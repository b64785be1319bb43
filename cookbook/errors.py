"""Every error that the cookbook raises on purpose.

CookbookError
|- ConfigError        (ValueError)    one or more problems of a config or its data set, reported together
|- DataError          (ValueError)    a row or a data file that cannot be used
|- ModelError         (ValueError)    a model folder, name or tokenizer that cannot be used
|- ShapeError         (ValueError)    tensors of a loss that do not fit together
|- BackendError       (RuntimeError)  the embedded backend cannot be started, reached or trusted
|- ProvisioningError  (RuntimeError)  a trainer or deployment that cannot be had
|- RequestRejected    (RuntimeError)  the trainer understood a request and refused it; the session stays usable
|- TrainerLost        (RuntimeError)  the trainer's session is gone; weights must be restored before training goes on
|- SamplingError      (RuntimeError)  a completion that cannot be had, or that lacks what training needs
|  |- DeploymentLost                  the deployment does not answer any more, and must be had again
|- RewardError        (RuntimeError)  a reward that raised, hung, or is not a finite number
|- WeightSyncError    (RuntimeError)  the deployment does not serve the weights that it should
|- LogprobMismatch    (RuntimeError)  sampler and trainer disagree about the same weights
|- CheckpointError    (RuntimeError)  a checkpoint or its record that is missing, damaged or cannot be written
|- LeaseLost          (RuntimeError)  another process owns the run
|- CredentialsError   (RuntimeError)  a password or key where it would be stored or logged

Each also inherits the standard error that it refines. All pickle: Prefect stores the exception of a failed task.
To add one: subclass CookbookError and the standard error, take one message, and say in it what was wrong, the value,
and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "DOES_NOT_FIT",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "CookbookError",
    "CredentialsError",
    "DataError",
    "DeploymentLost",
    "LeaseLost",
    "LogprobMismatch",
    "ModelError",
    "Problem",
    "ProvisioningError",
    "RequestRejected",
    "RewardError",
    "SamplingError",
    "ShapeError",
    "TrainerLost",
    "WeightSyncError",
]


DOES_NOT_FIT = "does not fit this model"
"""What the embedded backend says of a checkpoint that is whole, but of another model; an older one is no better."""


class CookbookError(Exception):
    """Base of all errors that the cookbook raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config or its data: where, what (with the value), and what to do."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} {self.remedy}".rstrip()


class ConfigError(CookbookError, ValueError):
    """All problems of a config and its data set, in one error, before anything is provisioned."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        return "\n".join([f"{head} in the config; nothing was provisioned:", *(f"  - {p}" for p in self.problems)])


class DataError(CookbookError, ValueError):
    """A row or a data file that cannot be used."""


class ModelError(CookbookError, ValueError):
    """A model folder, model name or tokenizer that cannot be used."""


class ShapeError(CookbookError, ValueError):
    """Tensors of a loss that do not fit together."""


class BackendError(CookbookError, RuntimeError):
    """The embedded backend cannot be started, reached or trusted."""


class ProvisioningError(CookbookError, RuntimeError):
    """A trainer or deployment that cannot be had."""


class RequestRejected(CookbookError, RuntimeError):
    """The trainer understood a request and refused it. The session stays usable; the request must change."""


class TrainerLost(CookbookError, RuntimeError):
    """The trainer's session is gone or can no longer be trusted. Reconnect and restore weights before training."""


class SamplingError(CookbookError, RuntimeError):
    """A completion that cannot be had, or that lacks what training needs. No row is lost by it."""


class DeploymentLost(SamplingError):
    """The deployment does not answer, or not yet, however often it is asked. It can be had again."""


class RewardError(CookbookError, RuntimeError):
    """A reward that raised, hung, or is not a finite number. The row stays to be sampled again."""


class WeightSyncError(CookbookError, RuntimeError):
    """The deployment does not serve the weights that it should, within the time it had."""


class LogprobMismatch(CookbookError, RuntimeError):
    """Sampler and trainer give the same tokens of the same weights different probabilities; training would be wrong."""


class CheckpointError(CookbookError, RuntimeError):
    """A checkpoint, or its record, that is missing, damaged or cannot be written."""


class LeaseLost(CookbookError, RuntimeError):
    """Another live process owns the run; this one must stop."""

    def __init__(self, message: str, *, started_by: str | None = None) -> None:
        super().__init__(message)
        self.started_by = started_by
        """Id of the flow run that the owner works for, where it works for one."""


class CredentialsError(CookbookError, RuntimeError):
    """A password or key where it would be stored or logged. Not a ValueError: Pydantic would show the value with it."""
