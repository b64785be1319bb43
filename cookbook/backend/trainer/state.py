"""Training state on disk: trainable weights and Adam moments in float32, through torch.distributed.checkpoint.

Safetensors files (no pickle). The folder around them and its manifest belong to cookbook/backend/snapshots.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cookbook.errors import CheckpointError

__all__ = ["TrainingState", "read_state", "write_state"]


@dataclass(frozen=True)
class TrainingState:
    """float32 tensors by parameter name; `moments` as Optimizer.moments() names them, empty when there are none."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def write_state(folder: Path, state: TrainingState) -> None:
    """Write all tensors into an empty folder, bit for bit."""
    with warnings.catch_warnings():
        # One process without a process group is intended: state is resharded when it is loaded, not here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            save(_named(state), storage_writer=HuggingFaceStorageWriter(path=str(folder)), no_dist=True)
        except CheckpointException as error:  # a BaseException around what happened on each rank
            raise next(iter(error.failures.values()))[0] from error


def read_state(folder: Path, weight_shapes: Mapping[str, torch.Size], *, with_moments: bool) -> TrainingState:
    """Read the tensors of exactly these weights. CheckpointError when the checkpoint is of other weights."""
    stored = _stored_shapes(folder)
    wanted = {f"model.{name}": shape for name, shape in weight_shapes.items()}
    theirs = {name: shape for name, shape in stored.items() if name.startswith("model.")}
    if different := sorted(dict(theirs.items() ^ wanted.items())):
        raise CheckpointError(
            f"checkpoint {folder} does not fit this model: {len(different)} weights differ in presence or shape, "
            f"first {different[0]}. Load it into a model with the same base and the same LoRA settings."
        )
    moments = _empty(weight_shapes, ("exp_avg", "exp_avg_sq")) if with_moments else {}
    state = TrainingState(_empty(weight_shapes, ()), moments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            load(_named(state), storage_reader=HuggingFaceStorageReader(path=str(folder)), no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    return state


def _named(state: TrainingState) -> dict[str, Tensor]:
    weights = {f"model.{name}": tensor.detach() for name, tensor in state.weights.items()}
    return weights | {f"optimizer.{name}": tensor for name, tensor in state.moments.items()}


def _empty(shapes: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    if not prefixes:
        return {name: torch.empty(shape) for name, shape in shapes.items()}
    return {f"{prefix}.{name}": torch.empty(shape) for name, shape in shapes.items() for prefix in prefixes}


def _stored_shapes(folder: Path) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
