"""LoRA adapters on a shared frozen base, through the peft library: attach, switch, export, read, merge.

Every adapter of every model is injected into one copy of the base weights; the one in use is switched on per
operation. What is trained and how is not decided here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cookbook.backend.decoder import HuggingFaceDecoder
from cookbook.errors import ModelError, RequestRejected

__all__ = ["LoraSettings", "activate", "attach", "detach", "merged_weights", "read_adapter", "write_adapter"]

_PEFT_PREFIX = "base_model.model."
_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is. Its contribution is multiplied by alpha / rank; `seed` fixes the initial A matrices.

    init_method: "kaiming" (A Kaiming-uniform, B zero), or "nora" (the same with each input column of A scaled to
    length 1 over the rank).
    """

    rank: int
    alpha: int
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    init_method: Literal["kaiming", "nora"] = "kaiming"


def attach(decoder: HuggingFaceDecoder, adapter: str, settings: LoraSettings) -> dict[str, nn.Parameter]:
    """Add an adapter under the name `adapter` and return its float32 parameters by name (without the adapter's name).

    ModelError when the model has none of the layers that `settings` selects.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_target_modules(decoder, settings),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # Several adapters on one base are intended, and merging below unties a tied head, which peft warns about.
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, decoder.model, adapter_name=adapter)
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = {}
    for name, layer in _lora_layers(decoder):
        if adapter in layer.lora_A:
            layer.lora_A[adapter].to(torch.float32)
            layer.lora_B[adapter].to(torch.float32)
            _initialise(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, settings, generator)
            parameters[f"{name}.lora_A.weight"] = layer.lora_A[adapter].weight
            parameters[f"{name}.lora_B.weight"] = layer.lora_B[adapter].weight
    return parameters


def activate(decoder: HuggingFaceDecoder, adapter: str | None) -> None:
    """Switch to one adapter, which alone then requires gradients, or with None to the bare base."""
    for _, layer in _lora_layers(decoder):
        layer.enable_adapters(adapter is not None)
        if adapter is not None:
            layer.set_adapter(adapter)


def detach(decoder: HuggingFaceDecoder, adapter: str) -> None:
    """Remove an adapter and free its memory."""
    for _, layer in _lora_layers(decoder):
        if adapter in layer.lora_A:
            layer.delete_adapter(adapter)
    del decoder.model.peft_config[adapter]


def write_adapter(
    folder: Path, decoder: HuggingFaceDecoder, adapter: str, parameters: dict[str, nn.Parameter], base_folder: Path
) -> None:
    """Write the adapter in float32 as a PEFT folder, which `peft.PeftModel.from_pretrained` loads."""
    tensors = {_PEFT_PREFIX + name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    save_file(tensors, folder / _ADAPTER_FILE, metadata={"format": "pt"})
    config = decoder.model.peft_config[adapter].to_dict()
    config |= {"base_model_name_or_path": str(base_folder), "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2, default=str))


def read_adapter(folder: Path, settings: LoraSettings, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The float32 tensors of a PEFT folder, for exactly these parameters.

    RequestRejected when the folder cannot be read, or when its adapter has another rank, scale or other layers.
    """
    try:
        config = orjson.loads((folder / "adapter_config.json").read_bytes())
        with safe_open(folder / _ADAPTER_FILE, framework="pt") as file:
            tensors = {name.removeprefix(_PEFT_PREFIX): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise RequestRejected(f"{folder} is not a PEFT folder with a LoRA adapter that can be read: {error}") from error
    scale, ours = config.get("lora_alpha", 0) / max(1, config.get("r", 0)), settings.alpha / settings.rank
    if scale != ours:
        raise RequestRejected(
            f"the adapter in {folder} has lora_alpha / r = {scale}, this model {ours}. "
            f"Create the model with lora_rank {config.get('r')} and lora_alpha {config.get('lora_alpha')}."
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if theirs != expected:
        different = sorted(dict(theirs.items() ^ expected.items()))
        raise RequestRejected(
            f"the adapter in {folder} does not fit this model: {len(different)} layers differ in presence or shape, "
            f"first {different[0]}. Create the model with the adapter's rank and target modules."
        )
    return tensors


def merged_weights(decoder: HuggingFaceDecoder, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """All weights of the model under their plain names, once each, with the adapter folded into those it adapts.

    With an adapter on a tied head, the head comes out with weights of its own.
    """
    adapted = {name: layer for name, layer in _lora_layers(decoder) if adapter in layer.lora_A}
    for name, layer in adapted.items():
        yield f"{name}.weight", layer.base_layer.weight.float() + layer.get_delta_weight(adapter).float()
    for name, parameter in decoder.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name and plain.removesuffix(".weight") not in adapted:
            yield plain, parameter


def _lora_layers(decoder: HuggingFaceDecoder) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in decoder.model.named_modules() if isinstance(module, LoraLayer))


def _target_modules(decoder: HuggingFaceDecoder, settings: LoraSettings) -> list[str]:
    """Last name parts of the linear layers to adapt, such as q_proj, told apart by the block that they are in."""
    targets = set()
    for name, module in decoder.model.named_modules():
        if not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        name = name.removesuffix(".base_layer")
        block = name.lower()
        is_head = module is decoder.head or module is getattr(decoder.head, "base_layer", None)
        is_attention = not is_head and ("attn" in block or "attention" in block)
        is_mlp = not is_head and ("mlp" in block or "feed_forward" in block or "ffn" in block)
        wanted = (
            is_head and settings.train_unembed,
            is_attention and settings.train_attn,
            is_mlp and settings.train_mlp,
        )
        if any(wanted):
            targets.add(name.rpartition(".")[2])
    if not targets:
        raise ModelError(
            f"the model has no linear layer that train_attn={settings.train_attn}, train_mlp={settings.train_mlp}, "
            f"train_unembed={settings.train_unembed} selects. Select another group of layers."
        )
    return sorted(targets)


@torch.no_grad()
def _initialise(a_RI: nn.Parameter, b_OR: nn.Parameter, settings: LoraSettings, generator: torch.Generator) -> None:
    """R rank, I inputs, O outputs of the adapted layer."""
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    if settings.init_method == "nora":
        a_RI.div_(a_RI.norm(dim=0, keepdim=True))
    b_OR.zero_()
