"""Model folders as the sampler reads them: the shape out of config.json, tensors, PEFT adapters.

What is not computed exactly here is a ModelError that names the field. Nothing is computed here.
"""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cookbook.backend.decoder import ComputeDtype, dithered
from cookbook.backend.deployment.linear import LoraWeights
from cookbook.errors import ModelError

__all__ = ["Adapter", "ModelShape", "ModelTensors", "read_adapter", "read_shape"]

_SERVED = ("llama", "mistral", "qwen2", "qwen3")
_PEFT_PREFIX = "base_model.model."
# PEFT settings that change what an adapter computes, with the only value that is served.
_PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. inverse_frequencies: float32 (head_dim / 2,), radians a position."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    is_tied: bool
    inverse_frequencies: Tensor


def read_shape(folder: Path) -> ModelShape:
    """Out of config.json. ModelError for models of another architecture than served here."""
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in _SERVED:
        raise ModelError(
            f"{folder} is a model of type {model_type!r}, which cannot be served here. "
            f"Choose one of {', '.join(_SERVED)}."
        )
    _check_computed(folder, config)
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    return ModelShape(
        model_type=model_type,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        max_positions=int(config["max_position_embeddings"]),
        eps=float(config["rms_norm_eps"]),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        inverse_frequencies=_inverse_frequencies(folder, config, head_dim),
    )


def _check_computed(folder: Path, config: dict[str, Any]) -> None:
    max_positions = config["max_position_embeddings"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if (window and window < max_positions) or layer_types != {"full_attention"}:
        raise ModelError(
            f"{folder} has a sliding attention window ({window}, layers {sorted(layer_types)}), which cannot be served "
            "here. Choose a model with full attention."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{folder} has the activation {config['hidden_act']!r}, only 'silu' is served here.")


def _inverse_frequencies(folder: Path, config: dict[str, Any], head_dim: int) -> Tensor:
    """Of rotary embeddings, in the layouts of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ModelError(f"{folder} rotates a part of each head only, which cannot be served here.")
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind == "llama3":
        return _llama3_frequencies(frequencies, rope, config)
    raise ModelError(f"{folder} scales positions by {kind!r}; default, linear and llama3 are served here.")


def _llama3_frequencies(frequencies: Tensor, rope: dict[str, Any], config: dict[str, Any]) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1's rope scaling)."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    share = (context / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, blended, scaled)


class ModelTensors:
    """The tensors of a folder by name, read when asked for. A context manager."""

    def __init__(self, folder: Path, compute_dtype: ComputeDtype) -> None:
        self._folder = folder
        self._compute_dtype = compute_dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {path}: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> ModelTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, name: str) -> Tensor | None:
        """As stored, or None."""
        file = self._files.get(name)
        return None if file is None else file.get_tensor(name)

    def get(self, name: str) -> Tensor:
        """As stored. ModelError when there is none."""
        tensor = self.find(name)
        if tensor is None:
            raise ModelError(f"{self._folder} lacks the weight {name}: copy the model again.")
        return tensor

    def rounded(self, name: str) -> Tensor:
        """In the compute dtype, rounded as the trainer rounds."""
        tensor = self.get(name)
        if self._compute_dtype == "float32":
            return tensor.float()
        return tensor if tensor.dtype == torch.bfloat16 else dithered(tensor.float())


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder} has no model.safetensors. Convert the model to safetensors.")
    return [folder / "model.safetensors"]


@dataclass
class Adapter:
    """Factors of a LoRA adapter by layer name, such as model.layers.0.self_attn.q_proj."""

    folder: Path
    weights: dict[str, LoraWeights]
    _used: set[str] = field(default_factory=set)

    def of_layer(self, number: int) -> dict[str, LoraWeights]:
        """Those of one block, by the name inside it."""
        prefix = f"model.layers.{number}."
        found = {name: weights for name, weights in self.weights.items() if name.startswith(prefix)}
        known = {n: w for n, w in found.items() if re.fullmatch(r".*\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj", n)}
        self._used |= known.keys()
        return {name.removeprefix(prefix): weights for name, weights in known.items()}

    def of_head(self) -> LoraWeights | None:
        if "lm_head" in self.weights:
            self._used.add("lm_head")
        return self.weights.get("lm_head")

    def check_all_used(self) -> None:
        """ModelError when it adapts a layer that this model does not have, or that cannot be adapted here."""
        if rest := sorted(self.weights.keys() - self._used):
            raise ModelError(
                f"the adapter in {self.folder} adapts {rest[0]} ({len(rest)} such layers), which is no linear layer of "
                "this model. Use an adapter of this model."
            )


def read_adapter(folder: Path) -> Adapter:
    """A PEFT folder. ModelError when it is not a plain LoRA adapter."""
    config = _read_json(folder / "adapter_config.json")
    for key, plain in _PLAIN_LORA.items():
        if (value := config.get(key, plain)) != plain and value:
            raise ModelError(f"the adapter in {folder} has {key} = {value!r}, only {plain!r} is served here.")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {name.removeprefix(_PEFT_PREFIX): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapter in {folder}: {error}") from error
    names = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in tensors}
    try:
        pairs = {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in names}
    except KeyError as error:
        raise ModelError(f"the adapter in {folder} has no tensor {error}: it is not a LoRA adapter.") from error
    return Adapter(folder, {name: LoraWeights(a_RI, b_OR * scale) for name, (a_RI, b_OR) in pairs.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value
