"""Export: a model of this machine as a folder for others, whole or not at all, with its card and its provenance.

What is written: config, safetensors weights, tokenizer, chat template, generation config; never a pickle, never code.
How an adapter is folded into its base: merge.py.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cookbook.errors import ModelError
from cookbook.files import read_json
from cookbook.models.card import model_card
from cookbook.models.folders import (
    CONFIG_PATTERNS,
    HUB_NAME,
    TOKENIZER_PATTERNS,
    adapted_model,
    check_model_folder,
    find_folder,
)
from cookbook.models.provenance import PROVENANCE_FILE, Provenance, read_provenance

__all__ = ["DTYPES", "FORMATS", "ExportedModel", "card_of", "export_model", "find_model", "model_name"]

FORMATS = ("auto", "merged", "adapter")
DTYPES = ("float32", "bfloat16", "float16")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD_FILE = "README.md"

_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_ELSEWHERE = re.compile(r"accounts/(?!local/)[^/]+/models/[^/]+")


@dataclass(frozen=True)
class ExportedModel:
    """A folder that was written."""

    model: str
    """Name of the model: its folder below <home>/models, or as it was given."""
    folder: Path
    format: str
    """"merged" (a whole model) or "adapter" (a PEFT folder, which needs its base)."""
    dtype: str
    """Of the weights: float32, bfloat16, ..."""
    size_bytes: int
    licence: str | None
    """SPDX identifier. None = unknown."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"folder": str(self.folder)}


def _quiet(message: str) -> None:
    pass


def export_model(
    model: str,
    folder: str | Path,
    *,
    home: Path,
    format: str = "auto",
    dtype: str | None = None,
    progress: Callable[[str], None] = _quiet,
) -> ExportedModel:
    """Write `model` into `folder`, which must not exist or be empty. Until all is written, nothing shows there.

    Args:
        model: name below <home>/models, accounts/local/models/<id>, a model folder, or a run directory (the model that
            the run promoted).
        home: COOKBOOK_HOME.
        format: "merged" = a whole model that works on its own, "adapter" = the PEFT folder of a LoRA adapter, which
            needs its base. "auto" = merged.
        dtype: of a merged model's weights: float32, bfloat16 or float16. None = as they are; of an adapter, as its
            base's are.
        progress: gets a line of text at each stage.

    Raises:
        ModelError: no such model, it is not on this machine, the folder is not empty or cannot be written, or the
            format or dtype does not fit.
    """
    found = find_model(model, home)
    is_adapter = (found / ADAPTER_FILES[0]).is_file() and not (found / "config.json").is_file()
    chosen = _chosen_format(found, format, dtype, is_adapter)
    target = _target(folder)
    provenance = read_provenance(home, str(found))
    base = adapted_model(found, home / "models") if is_adapter else found
    tokenizer = _tokenizer_folder(found, base, provenance, home)
    with _built_beside(target) as building:
        progress(f"writing {chosen} weights")
        notes: list[str] = []
        if chosen == "adapter":
            _copy_adapter(found, building, provenance)
        elif is_adapter:
            from cookbook.models.merge import merge_adapter

            notes = merge_adapter(base, found, building, dtype)
        else:
            notes = _copy_model(found, building, dtype)
        _copy(tokenizer, building, TOKENIZER_PATTERNS)
        _copy(base, building, ("generation_config.json",))
        written = _dtype_of(building)
        loaded_with = _hub_or_folder(provenance, base) if chosen == "adapter" else None
        card = model_card(provenance, name=target.name, adapter=chosen == "adapter", base=loaded_with, notes=notes)
        (building / CARD_FILE).write_text(card, encoding="utf-8")
        _write_json(building / PROVENANCE_FILE, provenance.shared().to_dict())
    size = sum(file.stat().st_size for file in target.iterdir())
    name = found.name if found.parent == (home / "models").resolve() else model
    return ExportedModel(name, target, chosen, written, size, provenance.licence)


def find_model(model: str, home: Path) -> Path:
    """The folder of a model of this machine, whole or adapter; of a run directory, the model that the run promoted.

    Raises:
        ModelError: there is none, or it is not on this machine.
    """
    model = model_name(model, home)
    if HUB_NAME.fullmatch(model) and not Path(model).is_dir():
        raise ModelError(f"{model} is no folder. A model of the hub needs no export: use it by its name.")
    if _ELSEWHERE.fullmatch(model):
        raise ModelError(
            f"{model} is a model on Fireworks, so its weights are not on this machine. Download it with firectl, "
            "Fireworks' own command line, which gives a Hugging Face folder or a PEFT folder."
        )
    found = find_folder(model, home / "models", hub_patterns=()).resolve()
    if not (found / ADAPTER_FILES[0]).is_file():
        check_model_folder(found)
    elif not (found / ADAPTER_FILES[1]).is_file():
        raise ModelError(f"{found} has no {ADAPTER_FILES[1]}. Promote the checkpoint anew, or copy the adapter again.")
    return found


def model_name(model: str, home: Path) -> str:
    """What `model` names: of a run directory the model that the run promoted, anything else itself.

    Raises:
        ModelError: the run has promoted none.
    """
    path = Path(model).expanduser()
    is_named = "/" not in model and (home / "models" / model).is_dir()
    return model if is_named or not (path / "run.json").is_file() else _promoted_by(path, home)


def card_of(model: str, home: Path) -> tuple[Provenance, str]:
    """What is known of a model, and its card. The model need not be on this machine if it was promoted from here.

    Raises:
        ModelError: there is no such model.
    """
    name = model_name(model, home)
    provenance = read_provenance(home, name)
    base = None
    if provenance.kind == "adapter" and not _ELSEWHERE.fullmatch(name):
        base = _hub_or_folder(provenance, adapted_model(find_model(name, home), home / "models"))
    title = name.rstrip("/").rpartition("/")[2]
    return provenance, model_card(provenance, name=title, adapter=provenance.kind == "adapter", base=base)


def _promoted_by(log_path: Path, home: Path) -> str:
    """Name of the model that a run promoted: at its end, or later by hand."""
    promoted = (read_json(log_path / "summary.json") or {}).get("model")
    if promoted:
        return str(promoted)
    run_id = (read_json(log_path / "run.json") or {}).get("run_id")
    records = [read_json(path) or {} for path in sorted((home / "provenance").glob("*.json"))]
    found = [record for record in records if record.get("run_id") == run_id]
    if not found:
        raise ModelError(
            f"run {run_id} in {log_path} has promoted no model. Set output_model_id and start it again, or promote a "
            "checkpoint of it with `cookbook checkpoints promote`."
        )
    return str(max(found, key=lambda record: str(record.get("created")))["model"])


def _chosen_format(found: Path, format: str, dtype: str | None, is_adapter: bool) -> str:
    if format not in FORMATS:
        raise ModelError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if format == "adapter" and not is_adapter:
        raise ModelError(f"{found.name} is a whole model, not an adapter. Export it as merged.")
    if format == "adapter" and dtype is not None:
        raise ModelError(f"an adapter keeps the dtype it was trained in, got dtype {dtype!r}. Leave dtype out.")
    return "adapter" if format == "adapter" else "merged"


def _target(folder: str | Path) -> Path:
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file. Give a folder that is empty or does not exist.")
    if target.is_dir() and any(target.iterdir()):
        raise ModelError(f"{target} is not empty, and nothing in it is overwritten. Give an empty or a new folder.")
    return target


@contextmanager
def _built_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place in one rename; gone after an error.

    It is locked while it is written: what a killed process left behind has no lock, and goes with the next export.
    """
    lock = None
    building = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        building = Path(tempfile.mkdtemp(prefix=f".export-{target.name}-", dir=target.parent))
        lock = os.open(building, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        building.chmod(0o755)
        yield building
        for path in [*building.iterdir(), building]:
            _fsync(path)
        building.rename(target)
        _fsync(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"{target} cannot be written: {reason}. Free space there, or give another folder.") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f".export-{target.name}-*"):
        descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another export is at work
            continue
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def _tokenizer_folder(found: Path, base: Path, provenance: Provenance, home: Path) -> Path:
    """Where the tokenizer that the model was trained with lies.

    What a run of this home was given, else the folder's own: an exported folder has the right one, and what the record
    in it names is of the machine that wrote it.
    """
    config = provenance.config if not (found / PROVENANCE_FILE).is_file() else {}
    chosen = config.get("tokenizer_model") or (config.get("deployment") or {}).get("tokenizer_model")
    if chosen:
        return find_folder(chosen, home / "models", hub_patterns=(*CONFIG_PATTERNS, *TOKENIZER_PATTERNS))
    return found if (found / "tokenizer_config.json").is_file() else base


def _copy(source: Path, building: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file() and path.suffix in (*_TEXT_SUFFIXES, ".safetensors"):
            _check_readable(path)
            shutil.copyfile(path, building / path.name)


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Get the model anew.") from error


def _copy_adapter(found: Path, building: Path, provenance: Provenance) -> None:
    _copy(found, building, ADAPTER_FILES)
    config = read_json(found / ADAPTER_FILES[0]) or {}
    config["base_model_name_or_path"] = _hub_or_folder(provenance, Path(config["base_model_name_or_path"]))
    _write_json(building / ADAPTER_FILES[0], config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _hub_or_folder(provenance: Provenance, folder: Path) -> str:
    """What an adapter's base is loaded by: its hub name, which everyone has, else its folder on this machine."""
    known = [parent.model for parent in provenance.parents if parent.origin != "unknown"]
    hub = next((model for model in known[:1] if HUB_NAME.fullmatch(model)), None)
    return hub or str(folder)


def _copy_model(found: Path, building: Path, dtype: str | None) -> list[str]:
    """A whole model, its weights in another dtype if asked for. Returns notes for the card."""
    present = _dtype_of(found)
    _copy(found, building, ("config.json", "*.safetensors", "*.safetensors.index.json"))
    if dtype is None or dtype == present:
        return []
    from cookbook.models.merge import cast_weights

    cast_weights(building, dtype)
    return [f"Its weights were {present}, and were converted to {dtype}."]


def _dtype_of(folder: Path) -> str:
    """Of the largest tensor in the first weight file, as torch names it."""
    from safetensors import SafetensorError, safe_open

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    path = min(folder.glob("*.safetensors"))
    try:
        with safe_open(path, framework="pt") as tensors:
            parts = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
            kind = str(max(parts, key=lambda part: math.prod(part.get_shape())).get_dtype())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Get the model anew.") from error
    return names.get(kind, kind)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
