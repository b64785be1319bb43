"""Model folders: which exist, what a name stands for, and whether a folder can be trained.

Light: neither torch nor transformers is imported here, and the hub only for a name that nothing local answers to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cookbook.errors import ModelError
from cookbook.models.catalogue import CATALOGUE

__all__ = [
    "HUB_NAME",
    "MODEL_RECORD",
    "ModelFolder",
    "adapted_model",
    "check_model_folder",
    "context_length",
    "find_folder",
    "list_models",
    "read_model_folder",
    "resolve_model",
]

MODEL_RECORD = "model.json"
LOCAL_MODEL = re.compile(r"accounts/local/models/(?P<id>[^/]+)")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What a hub model is called: organization/model."""
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")
CONFIG_PATTERNS = ("config.json", "generation_config.json")
HUB_TIMEOUT_S = 10
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class ModelFolder:
    """A model below the models folder: pulled, promoted, or put there by the user."""

    name: str
    path: Path
    source: str
    """Where it comes from: a requirement and file, a promoted checkpoint, or "" when the folder does not say."""
    licence: str
    """SPDX identifier, or "" when the folder does not say."""
    size_bytes: int
    is_adapter: bool
    """A LoRA adapter in PEFT layout; it cannot be a base model."""


def list_models(models_dir: Path) -> list[ModelFolder]:
    """Every model below `models_dir`, by name. A folder that does not exist holds none.

    Raises:
        ModelError: a folder's model.json is damaged.
    """
    if not models_dir.is_dir():
        return []
    folders = [path for path in sorted(models_dir.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    markers = (MODEL_RECORD, "config.json", "adapter_config.json")
    return [read_model_folder(path) for path in folders if any((path / marker).is_file() for marker in markers)]


def read_model_folder(path: Path) -> ModelFolder:
    """Describe one folder from its model.json, if it has one, and its files.

    Raises:
        ModelError: model.json is damaged.
    """
    record = _read_json(path / MODEL_RECORD) if (path / MODEL_RECORD).is_file() else {}
    return ModelFolder(
        name=path.name,
        path=path,
        source=str(record.get("source") or ""),
        licence=str(record.get("licence") or ""),
        size_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        is_adapter=(path / "adapter_config.json").is_file(),
    )


def resolve_model(name: str, models_dir: Path, *, adapters: bool = False) -> Path:
    """The folder of the model that `name` stands for: config.json plus safetensors weights. With `adapters`, a LoRA
    adapter does too: it can be served, but not trained from.

    Tried in this order: a name below `models_dir` (pulled or promoted), `accounts/local/models/<id>`, a folder on
    disk, a hub name `organization/model` (from the local hub cache, else downloaded).

    Raises:
        ModelError: nothing answers to the name, or the folder cannot be trained; says what exists and what to do.
    """
    folder = find_folder(name, models_dir, hub_patterns=(*CONFIG_PATTERNS, *TOKENIZER_PATTERNS, *WEIGHT_PATTERNS))
    if not (adapters and (folder / "adapter_config.json").is_file()):
        check_model_folder(folder)
    return folder.resolve()


def adapted_model(adapter: Path, models_dir: Path) -> Path:
    """The folder of the model that the LoRA adapter in this folder adapts, by its name on the wire (model.json), else
    as the adapter itself names it (adapter_config.json): a folder, a hub name.

    Raises:
        ModelError: it names none, or that is no whole model.
    """
    record = _read_json(adapter / MODEL_RECORD) if (adapter / MODEL_RECORD).is_file() else {}
    named = (record.get("base_model"), _read_json(adapter / "adapter_config.json").get("base_model_name_or_path"))
    problem = None
    for name in dict.fromkeys(name for name in named if name and isinstance(name, str)):
        try:
            return resolve_model(name, models_dir)
        except ModelError as error:
            problem = error
    raise ModelError(
        f"the base model of the adapter {adapter.name} is not on this machine: {problem or 'it names none.'} "
        "The adapter is of no use without it: bring it back first."
    )


def find_folder(name: str, models_dir: Path, *, hub_patterns: Sequence[str]) -> Path:
    """The folder that `name` stands for, whatever is in it; of a hub model only the files matching `hub_patterns`.

    Raises:
        ModelError: nothing answers to the name.
    """
    local = LOCAL_MODEL.fullmatch(name)
    plain = local["id"] if local else name
    if plain and "/" not in plain and plain not in (".", "..") and (models_dir / plain).is_dir():
        return models_dir / plain
    path = Path(name).expanduser()
    if not local and name and path.is_dir():
        return path
    if plain in CATALOGUE:
        raise ModelError(f"model {plain!r} is not on this machine yet. Run `cookbook models pull {plain}`.")
    if not local and HUB_NAME.fullmatch(name):
        return _from_hub(name, models_dir, hub_patterns)
    raise ModelError(f"no model {name!r}: it is not a folder. {_what_exists(models_dir)}")


def check_model_folder(folder: Path) -> None:
    """Check that `folder` holds a config and complete safetensors weights. Nothing is loaded.

    Raises:
        ModelError: something is missing, the weights are pickles, or it is a LoRA adapter.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{folder} is a LoRA adapter of {base!r}, not a whole model. Use a full-parameter model as base_model."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder. Give a Hugging Face model folder.")
    _read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)} of its {len(shards)} weight files. Copy it anew.")
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights only as {pickles[0]}: a pickle can run code when loaded, so it is not opened. "
            "Convert the weights to safetensors."
        )
    return f"{folder} has a config.json but no *.safetensors file. Copy the weights too."


def context_length(folder: Path) -> int:
    """Longest sequence in tokens that the model in `folder` was made for, from its config.json.

    Raises:
        ModelError: config.json is missing, damaged, or does not say.
    """
    config = _read_json(folder / "config.json")
    for level in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(level.get(key), int):
                return int(level[key])
    raise ModelError(f"{folder / 'config.json'} does not say the context length. Add max_position_embeddings.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}. Give a Hugging Face model folder.") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Restore the file or make the folder anew.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object. Restore the file.")
    return content


def _what_exists(models_dir: Path) -> str:
    present = [path.name for path in sorted(models_dir.glob("*/")) if not path.name.startswith(".")]
    absent = sorted(set(CATALOGUE) - set(present))
    parts = [f"Models on this machine: {', '.join(present) or 'none'}."]
    if absent:
        parts.append(f"To pull with `cookbook models pull NAME`: {', '.join(absent)}.")
    return " ".join([*parts, "A folder is given by its path, a hub model as organization/model."])


def _from_hub(name: str, models_dir: Path, patterns: Sequence[str]) -> Path:
    """Download the model; the hub's client falls back to its own cache when the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # the client raises the exceptions of whichever HTTP library it was built with
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"no model {name!r}: it is not a folder, and the hub did not give it ({reason}). {_what_exists(models_dir)}"
        ) from error
