"""Models of this home: what a base_model on the wire means on disk, and the model resources of the API.

A model is a folder under <home>/models: a Hugging Face model, or a PEFT adapter, with a model.json beside its files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import ApiError, Code, JsonAnswer, rfc3339
from cookbook.backend.control_plane.context import ACCOUNT, plane_of
from cookbook.backend.paths import read_json

__all__ = [
    "ADAPTED_MODEL",
    "BASE_MODEL",
    "PEFT_ADDON",
    "adapted_folder",
    "context_length",
    "get_model",
    "list_models",
    "model_resource",
    "resolve_base_model",
]

BASE_MODEL = "HF_BASE_MODEL"
PEFT_ADDON = "HF_PEFT_ADDON"
ADAPTED_MODEL = "adapted_model"
"""In a deployment's extraValues: the folder of the model that its LoRA adapter adapts."""

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_MODEL_NAME = re.compile(r"accounts/local/models/([A-Za-z0-9][A-Za-z0-9._-]*)")


def resolve_base_model(models_dir: Path, base_model: object, *, adapters: bool = False) -> Path:
    """The folder that a worker loads for a `baseModel`: `accounts/local/models/<id>` or an absolute folder.

    With `adapters`, a LoRA adapter does too: it can be served, but not trained from.

    Raises:
        ApiError: it is neither, or there is no such Hugging Face model in that folder (400).
    """
    named = _MODEL_NAME.fullmatch(base_model) if isinstance(base_model, str) else None
    if named is not None:
        folder = models_dir / named.group(1)
        remedy = (
            f"Get it with `cookbook models pull {named.group(1)}`, or pass the absolute path of a Hugging Face folder."
        )
    elif isinstance(base_model, str) and base_model.startswith("/"):
        folder = Path(base_model)
        remedy = "Pass the absolute path of a Hugging Face folder (config.json, weights, tokenizer)."
    else:
        raise ApiError(
            Code.INVALID_ARGUMENT,
            f"baseModel {base_model!r} is not a model of the embedded backend. Pass accounts/local/models/<id> "
            "(get one with `cookbook models pull <id>`) or the absolute path of a Hugging Face folder.",
        )
    is_adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file() and not (adapters and is_adapter):
        if is_adapter:
            remedy = "It is a LoRA adapter. Train from its base model, or from a checkpoint saved as merged_base."
        raise ApiError(
            Code.INVALID_ARGUMENT, f"baseModel {base_model!r}: there is no config.json in {folder}. {remedy}"
        )
    return folder.resolve()


def adapted_folder(folder: Path, given: str | None) -> Path:
    """The folder of the model itself: `folder`, or for a LoRA adapter the one that it adapts. That is `given`, which
    the client has looked up, else what the adapter names.

    Raises:
        ApiError: there is no model in it (400).
    """
    if (folder / "config.json").is_file():
        return folder
    base = given or (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        raise ApiError(
            Code.INVALID_ARGUMENT,
            f"{folder} is a LoRA adapter on {base!r}, which is no model folder here. Put its base model back there, or "
            f"name its folder in extraValues.{ADAPTED_MODEL}.",
        )
    return Path(base)


def context_length(folder: Path) -> int | None:
    """The longest sequence a model was made for, in tokens, or None when its config.json does not say."""
    config = read_json(folder / "config.json") or {}
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        for key in _CONTEXT_KEYS:
            length = section.get(key)
            if isinstance(length, int) and length > 0:
                return length
    return None


def model_resource(models_dir: Path, model_id: str) -> dict[str, Any] | None:
    """The API's description of one model, or None when there is none."""
    folder = models_dir / model_id
    adapter = read_json(folder / "adapter_config.json")
    config = read_json(folder / "config.json")
    if adapter is None and config is None:
        return None
    record = read_json(folder / "model.json") or {}
    created = record.get("created")
    resource = {
        "name": f"accounts/{ACCOUNT}/models/{model_id}",
        "state": "READY",
        "kind": PEFT_ADDON if config is None else BASE_MODEL,
        "createTime": created if isinstance(created, str) else rfc3339(folder.stat().st_mtime),
        "source": record.get("source"),
        "baseModel": record.get("base_model"),
        "path": str(folder),
    }
    if config is not None:
        return resource | {"baseModelDetails": {"moe": _is_mixture(config)}}
    assert adapter is not None
    details = {
        "baseModel": record.get("base_model") or adapter.get("base_model_name_or_path"),
        "r": adapter.get("r"),
        "targetModules": adapter.get("target_modules"),
    }
    return resource | {"peftDetails": details}


def _is_mixture(config: dict[str, Any]) -> bool:
    counts = [config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    return any(isinstance(count, int) and count > 1 for count in counts)


async def list_models(request: Request) -> Response:
    """GET models: all of them, by name."""
    models_dir = plane_of(request).paths.models
    ids = sorted(folder.name for folder in models_dir.iterdir() if not folder.name.startswith("."))
    models = [model_resource(models_dir, model_id) for model_id in ids]
    return JsonAnswer({"models": [model for model in models if model is not None], "nextPageToken": ""})


async def get_model(request: Request) -> Response:
    """GET models/{model}."""
    name = f"accounts/{ACCOUNT}/models/{request.path_params['model']}"
    found = None
    if _MODEL_NAME.fullmatch(name):
        found = model_resource(plane_of(request).paths.models, request.path_params["model"])
    if found is None:
        raise ApiError(
            Code.NOT_FOUND, f"there is no model {name}. `cookbook models list` shows the models of this backend."
        )
    return JsonAnswer(found)
