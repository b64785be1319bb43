"""Folding a LoRA adapter into its base with peft, and weights in another dtype. Imports torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cookbook.errors import ModelError
from cookbook.files import read_json, write_json

__all__ = ["cast_weights", "merge_adapter"]

_NOISE_SIZE = 1 << 20


def merge_adapter(base: Path, adapter: Path, into: Path, dtype: str | None) -> list[str]:
    """Write the model that `base` with `adapter` is: merged in float32, in the base's dtype if no other is asked for.

    An adapter on an output head that shares its weights with the embedding gives the head weights of its own.

    Returns:
        Notes for the model's card.

    Raises:
        ModelError: base or adapter cannot be loaded, do not fit together, or have a weight too large for the dtype.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with _quiet_libraries():
        try:
            stored = _stored_dtype(AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False))
            chosen = getattr(torch, dtype) if dtype is not None else stored
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            if _adapts_head(model, adapter):
                _untie(model)
            merged = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).merge_and_unload()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"the adapter in {adapter} cannot be merged into {base}: {error}") from error
        for name, parameter in merged.named_parameters():
            parameter.data = _converted(name, parameter.data, chosen)
        merged.config.dtype = chosen
        merged.generation_config = GenerationConfig()  # the base's own file is copied
        try:
            merged.save_pretrained(into)
        except SafetensorError as error:  # how safetensors reports a failed write
            raise OSError(str(error)) from error
    rounding = "" if chosen == torch.float32 else f" and rounded to {str(chosen).removeprefix('torch.')}"
    return [
        f"A LoRA adapter was merged into its base in float32{rounding}: answers may differ in places from those of "
        "base and adapter side by side."
    ]


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars, and none of the warnings that peft gives without cause here."""
    from transformers.utils import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on tied weights: they are untied here
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
        enabled = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if enabled:
                logging.enable_progress_bar()


def cast_weights(folder: Path, dtype: str) -> None:
    """Replace the floating-point weights of a model folder, file by file, by the same in another dtype.

    Raises:
        ModelError: a weight is too large for it.
    """
    chosen = getattr(torch, dtype)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: _converted(name, file.get_tensor(name), chosen) for name in file.keys()}  # noqa: SIM118
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        write_json(folder / "model.safetensors.index.json", {**index, "metadata": {"total_size": size}})
    config = {key: value for key, value in (read_json(folder / "config.json") or {}).items() if key != "torch_dtype"}
    write_json(folder / "config.json", {**config, "dtype": dtype})


def _stored_dtype(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _adapts_head(model: Any, adapter: Path) -> bool:
    """Whether the adapter changes an output head that has no weights of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return any(f".{name}.lora_A" in key for key in file.keys())  # noqa: SIM118


def _untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`_rounded`. ModelError where a number became infinite: float16 ends at 65,504."""
    rounded = _rounded(weight, dtype)
    lost = torch.isinf(rounded) if rounded.dtype != weight.dtype else None
    if lost is not None and bool(torch.isfinite(weight[lost]).any()):
        largest, kind = weight.abs().max().item(), str(dtype).removeprefix("torch.")
        raise ModelError(f"weight {name} has {largest:g}, too large for {kind}. Export as bfloat16 or float32.")
    return rounded


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; from float32 to bfloat16 up or down at random, with the right mean and a fixed seed.

    What an adapter adds is often less than half a bfloat16 digit of a weight; rounding to nearest would drop it. A
    weight that is a bfloat16 value stays as it is. Stochastic rounding: Gupta et al. 2015, arXiv:1502.02551.
    """
    if not weight.is_floating_point() or weight.dtype == dtype:
        return weight.contiguous()
    if dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return weight.to(dtype).contiguous()
    exact = weight.contiguous().view(-1)
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    noise = torch.randint(2**16, (_NOISE_SIZE,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for part, into in zip(torch.split(exact, _NOISE_SIZE), torch.split(rounded, _NOISE_SIZE), strict=True):
        bits = part.view(torch.int32) + noise[: len(part)]
        into.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
    return rounded.view(weight.shape)
