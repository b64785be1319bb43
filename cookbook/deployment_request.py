"""What a backend is asked for as a deployment: the model by its name on the wire, the request, an id for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from fireworks.training.sdk import DeploymentConfig

from cookbook.config import DeployConfig
from cookbook.control_plane import ControlPlane
from cookbook.deadlines import Deadline
from cookbook.models.folders import adapted_model, resolve_model
from cookbook.provisioning import wire_model

__all__ = ["ROLE", "ServedModel", "deployment_id_of", "deployment_request", "request_fingerprint", "served_model"]

ROLE = "sampler"
"""Of the deployment that hot loads from the policy's trainer."""

_LONGEST_ID = 63


@dataclass(frozen=True)
class ServedModel:
    """A model to deploy, looked up once: a hub name may mean another revision an hour later."""

    name: str
    """On the wire."""
    adapted: Path | None = None
    """Of a LoRA adapter on this machine: the folder of the model that it adapts."""

    @property
    def extra_values(self) -> dict[str, str]:
        """What the embedded backend takes the adapted model from: an adapter may name it by its name on the hub."""
        return {} if self.adapted is None else {"adapted_model": str(self.adapted)}


def served_model(model: str, backend: str, models_dir: Path) -> ServedModel:
    """Look a model up: base, promoted, or a LoRA adapter (a PEFT folder).

    Raises:
        ModelError: no such model on this machine, or the one that it adapts is not.
        ConfigError: not a resource name.
    """
    name = wire_model(model, backend, models_dir, adapters=True)
    if backend != "embedded":
        return ServedModel(name)
    folder = resolve_model(name, models_dir, adapters=True)
    is_whole = (folder / "config.json").is_file()
    return ServedModel(name, None if is_whole else adapted_model(folder, models_dir))


def deployment_id_of(base_model: str, run_id: str, generation: int, role: str = ROLE) -> str:
    """The id of a run's own deployment: model, run, the role if it is not the sampler's, the generation from the
    second one on.

    >>> deployment_id_of("accounts/local/models/SmolLM2-135M", "rl-1f2e3d4c", 2)
    'smollm2-135m-rl-1f2e3d4c-g2'
    """
    end = f"-{run_id}" + ("" if role == ROLE else f"-{role}") + ("" if generation == 1 else f"-g{generation}")
    last = base_model.rstrip("/").rsplit("/", 1)[-1].lower()
    slug = re.sub(r"[^a-z0-9]+", "-", last)[: _LONGEST_ID - len(end)].strip("-")
    return f"{slug or 'model'}{end}"


def deployment_request(
    control: ControlPlane, wanted: DeployConfig, base_model: str, training_shape_id: str | None, deadline: Deadline
) -> DeploymentConfig:
    """What to ask the backend for a deployment that hot loads, without an id and a trainer job."""
    shape, accelerator = wanted.deployment_shape, wanted.deployment_accelerator_type
    if shape is None and accelerator is None and training_shape_id is not None:
        shape = control.shape(training_shape_id, max(1.0, deadline.remaining())).deployment_shape_version
    if not shape and accelerator is None:
        accelerator = "CPU"  # only the embedded backend gets here: the config wants one of them otherwise
    replicas = wanted.replica_count or 1
    hardware = {"deployment_shape": shape} if shape else {"accelerator_type": accelerator}
    return DeploymentConfig(
        deployment_id="",
        base_model=base_model,
        **hardware,
        accept_shapeless_risk=not shape,
        region=wanted.deployment_region,
        min_replica_count=replicas,
        max_replica_count=replicas,
        hot_load_bucket_type=wanted.hot_load_bucket_type,
        hot_load_transition_type="SYNC",  # a sequence in flight ends on the weights that it began with
        disable_speculative_decoding=wanted.disable_speculative_decoding,
        extra_args=wanted.deployment_extra_args,
        extra_values=wanted.extra_values,
        for_training=True,  # so that the backend may free it when this process and the trainer are gone
    )


def request_fingerprint(request: DeploymentConfig, shape: str | None) -> str:
    """What was asked for. A shape as the config names it: a new version of it does not make a deployment wrong."""
    values = dataclasses.asdict(request) | {"deployment_shape": shape}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
