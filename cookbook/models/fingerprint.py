"""What a model's numbers depend on, as one fingerprint: files by their content, so that a path means nothing.

For what is kept between runs and is only true of one model, such as reference logprobs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook.errors import ModelError
from cookbook.files import read_json
from cookbook.models.folders import adapted_model, resolve_model

if TYPE_CHECKING:
    from cookbook.config import DPOConfig

__all__ = ["model_fingerprint", "reference_fingerprint", "served_fingerprint"]

_BLOCK_BYTES = 2**20


def model_fingerprint(backend: str, base_model: str, models_dir: Path) -> str:
    """What a base model computes, apart from how it is run.

    Args:
        backend: "embedded": sha256 (hex) over the content of config.json and of the weight files, each under its name.
            Tokenizer, generation settings and where the folder is do not count. "fireworks": the resource name, as the
            content of a model resource never changes.
        base_model: as in the config.
        models_dir: the folder of the models that have names.

    Raises:
        ModelError: no such model on this machine, or a file of it cannot be read.
    """
    if backend != "embedded":
        return base_model
    folder = resolve_model(base_model, models_dir)
    sha256 = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        sha256.update(f"{path.name}\0{_file_digest(path)}\n".encode())
    return sha256.hexdigest()


def served_fingerprint(backend: str, model: str, models_dir: Path) -> str:
    """As `model_fingerprint`, of a model that can be served: a LoRA adapter too, with the base model that it adapts.

    Raises:
        ModelError: as for `model_fingerprint`; of an adapter's base too.
        CheckpointError: adapter_config.json is damaged.
    """
    if backend != "embedded":
        return model
    folder = resolve_model(model, models_dir, adapters=True)
    if (folder / "config.json").is_file():
        return model_fingerprint(backend, str(folder), models_dir)
    config = read_json(folder / "adapter_config.json") or {}
    config.pop("base_model_name_or_path", None)  # a place, and not what lies there
    base = model_fingerprint(backend, str(adapted_model(folder, models_dir)), models_dir)
    weights = {path.name: _file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    text = json.dumps({"config": config, "base": base, "weights": weights}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def reference_fingerprint(config: DPOConfig, models_dir: Path) -> str:
    """sha256 (hex) over all that changes the logprobs of a DPO run's reference: the base model, and how it is run.

    The number of threads is left out: it moves the last bits only.

    Raises:
        ModelError: as for `model_fingerprint`.
    """
    infra = config.infra
    own_shape = infra.ref_training_shape_id if config.needs_reference_trainer else None
    parts = {
        "compute_dtype": _computes_bfloat16() if config.backend == "embedded" else None,
        "backend": config.backend,
        "base_model": model_fingerprint(config.backend, config.base_model, models_dir),
        "extra_args": [argument for argument in infra.extra_args or [] if not argument.startswith("--threads=")],
        "shape": own_shape or infra.training_shape_id,
        "image": infra.custom_image_tag,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices, which --compute-dtype=auto follows."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _file_digest(path: Path) -> str:
    """sha256 of a file, read in blocks: weights may be larger than the memory."""
    sha256 = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                sha256.update(block)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}. Restore the file.") from error
    return sha256.hexdigest()
