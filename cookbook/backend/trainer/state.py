"""Training state on disk: trainable weights and Adam moments in float32, as torch.distributed.checkpoint reads them.

Safetensors files (no pickle). They are written here and not through torch, whose writer makes a copy of all tensors and
leaves the files to be read again for their hashes. The folder around them and its manifest belong to
cookbook/backend/snapshots.py.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from cookbook.backend.snapshots import FileEntry, write_file
from cookbook.errors import DOES_NOT_FIT, CheckpointError

__all__ = ["TrainingState", "read_state", "write_state"]

_MAX_THREADS = 8
_FILE_BYTES = 256 * 2**20
"""Of tensors in one file, at least: so that several threads write, hash and verify a large state."""


@dataclass(frozen=True)
class TrainingState:
    """float32 tensors by parameter name; `moments` as Optimizer.moments() names them, empty when there are none."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def write_state(folder: Path, state: TrainingState, stop: Callable[[], bool] = lambda: False) -> dict[str, FileEntry]:
    """Write all tensors into an empty folder, bit for bit, flush the files, and return their sizes and hashes.

    Raises:
        InterruptedError: `stop` said so; it is asked every few megabytes.
        OSError: for example when the disk is full.
    """
    files = _divided(_named(state))
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    failed = False

    def write(name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        nonlocal failed
        try:
            return write_file(folder / name, _pieces(tensors), stop=lambda: failed or stop())
        except BaseException:
            failed = True  # the other threads need not go on
            raise

    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, _MAX_THREADS)) as threads:
        written = [threads.submit(write, name, tensors) for name, tensors in zip(names, files, strict=True)]
    errors = [error for future in written if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, InterruptedError))  # what the others stopped for
    entries = {name: future.result() for name, future in zip(names, written, strict=True)}
    (folder / "model.safetensors.index.json").write_text(_index(names, files))
    return entries


def read_state(folder: Path, weight_shapes: Mapping[str, torch.Size], *, with_moments: bool) -> TrainingState:
    """Read the tensors of exactly these weights. CheckpointError when the checkpoint is of other weights."""
    stored = _stored_shapes(folder)
    wanted = {f"model.{name}": shape for name, shape in weight_shapes.items()}
    theirs = {name: shape for name, shape in stored.items() if name.startswith("model.")}
    if different := sorted(dict(theirs.items() ^ wanted.items())):
        raise CheckpointError(
            f"checkpoint {folder} {DOES_NOT_FIT}: {len(different)} weights differ in presence or shape, "
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


def _divided(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each file."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size >= _FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    return files


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file: the length of its header, the header, the tensors."""
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().numpy().data.cast("B")


def _index(names: Sequence[str], files: Sequence[Mapping[str, Tensor]]) -> str:
    """Which file has which tensor, for other readers of such folders."""
    sizes = [tensor.nbytes for tensors in files for tensor in tensors.values()]
    places = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    return json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": places}, indent=2)


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
