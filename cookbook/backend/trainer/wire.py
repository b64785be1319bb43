"""Requests of the training API's wire protocol, parsed and checked: JSON objects in, records out.

Everything wrong with a request is a RequestRejected that names the field and the value. Nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from cookbook.backend.trainer.compute import BatchResult, Datum, TopK
from cookbook.backend.trainer.lora import LoraSettings
from cookbook.backend.trainer.optimizer import AdamParams, GradientNormalization
from cookbook.errors import RequestRejected
from cookbook.losses import KERNELS, Kernel, LossConfig

__all__ = [
    "ForwardRequest",
    "OptimRequest",
    "Parsed",
    "Sizes",
    "forward_answer",
    "parse_forward",
    "parse_lora",
    "parse_optim",
    "require",
]

Parsed = dict[str, Any]
"""A JSON object from the wire, unchecked."""

_Array = np.ndarray[Any, Any]

# Names on the wire of LossInput's tensors.
_LOSS_INPUTS = {"weights": "weights", "logprobs": "old_logprobs", "advantages": "advantages"}
_MAX_LORA_RANK = 1024


@dataclass(frozen=True)
class Sizes:
    """Limits that a datum is checked against: token ids are below `vocab_size`, a datum has at most `max_tokens`."""

    vocab_size: int
    max_tokens: int


@dataclass(frozen=True)
class ForwardRequest:
    """A checked forward or forward_backward. `top_k` is 0 when no top-k logprobs are wanted."""

    data: list[Datum]
    kernel: Kernel
    config: LossConfig
    top_k: int


@dataclass(frozen=True)
class OptimRequest:
    """A checked optim_step."""

    adam: AdamParams
    normalization: GradientNormalization


def require(body: Parsed, key: str, kind: type | tuple[type, ...]) -> Any:
    """body[key] when it is of that kind; RequestRejected otherwise. A bool is not a number here."""
    value = body.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise RequestRejected(f"{key} must be {kinds}, got {_short(value)}.")
    return value


def parse_forward(body: Parsed, sizes: Sizes, *, is_backward: bool) -> ForwardRequest:
    """The `forward_backward_input` or `forward_input` object."""
    given = require(body, "forward_backward_input" if is_backward else "forward_input", dict)
    kernel = KERNELS.get(name := require(given, "loss_fn", str))
    if kernel is None:
        raise RequestRejected(f"loss_fn {name!r} is not known here. Use one of {', '.join(sorted(KERNELS))}.")
    config = dict(given.get("loss_fn_config") or {})
    top_k = 0
    if not is_backward and "top_k" in config:
        top_k = require(config, "top_k", (int, float))
        if not (top_k == int(top_k) and 1 <= top_k <= sizes.vocab_size):
            raise RequestRejected(f"top_k must be an integer from 1 to {sizes.vocab_size}, got {top_k}.")
        del config["top_k"]
    data = require(given, "data", list)
    if not data:
        raise RequestRejected("data is empty: send at least one datum.")
    datums = [_parse_datum(datum, number, kernel, sizes) for number, datum in enumerate(data)]
    return ForwardRequest(datums, kernel, kernel.check_config(config), int(top_k))


def parse_optim(body: Parsed) -> OptimRequest:
    """`adam_params` and `grad_accumulation_normalization`."""
    given = require(body, "adam_params", dict)
    values = {field.name: float(require(given, field.name, (int, float))) for field in fields(AdamParams)}
    for name, value in values.items():
        below_one = name in ("beta1", "beta2")
        if not math.isfinite(value) or value < 0 or (below_one and value >= 1):
            upper = "below 1" if below_one else "finite"
            raise RequestRejected(f"{name} must be at least 0 and {upper}, got {value}.")
    normalization = body.get("grad_accumulation_normalization") or "none"
    if normalization not in get_args(GradientNormalization):
        allowed = ", ".join(get_args(GradientNormalization))
        raise RequestRejected(f"grad_accumulation_normalization must be one of {allowed}, got {normalization!r}.")
    return OptimRequest(AdamParams(**values), cast(GradientNormalization, normalization))


def parse_lora(config: Parsed) -> LoraSettings:
    """A `lora_config` with a rank above 0. Without alpha it is twice the rank."""
    rank = require(config, "rank", int)
    if not 1 <= rank <= _MAX_LORA_RANK:
        raise RequestRejected(f"lora rank must be from 1 to {_MAX_LORA_RANK}, got {rank}.")
    alpha = config.get("alpha")
    if alpha is not None and require(config, "alpha", int) < 1:
        raise RequestRejected(f"lora alpha must be at least 1, got {alpha}.")
    init_method = config.get("init_method") or "kaiming"
    if init_method not in ("kaiming", "nora"):
        raise RequestRejected(f"lora init_method must be kaiming or nora, got {init_method!r}.")
    seed = config.get("seed")
    return LoraSettings(
        rank=rank,
        alpha=2 * rank if alpha is None else alpha,
        seed=0 if seed is None else require(config, "seed", int),
        init_method=cast(Literal["kaiming", "nora"], init_method),
        **{group: config.get(group, True) is True for group in ("train_attn", "train_mlp", "train_unembed")},
    )


def forward_answer(result: BatchResult, extra: TopK | None) -> Parsed:
    """The ForwardBackwardOutput object, one output per datum in request order."""
    outputs = [{"logprobs": _tensor_answer(values, "float32")} for values in result.logprobs]
    if extra is not None:
        for output, values, tokens in zip(outputs, extra.logprobs, extra.indices, strict=True):
            output["top_k_logprobs"] = _tensor_answer(values, "float32")
            output["top_k_indices"] = _tensor_answer(tokens, "int64")
    return {"loss_fn_output_type": "TorchLossReturn", "loss_fn_outputs": outputs, "metrics": result.metrics}


def _parse_datum(datum: Any, number: int, kernel: Kernel, sizes: Sizes) -> Datum:
    where = f"data[{number}]"
    if not isinstance(datum, dict):
        raise RequestRejected(f"{where} must be an object, got {_short(datum)}.")
    tokens = _parse_tokens(datum.get("model_input"), where, sizes)
    inputs = datum.get("loss_fn_inputs")
    if not isinstance(inputs, dict) or "target_tokens" not in inputs:
        raise RequestRejected(f"{where}.loss_fn_inputs must hold target_tokens, got {_short(inputs)}.")
    targets = _parse_tensor(inputs["target_tokens"], f"{where}.target_tokens", np.dtype(np.int64))
    if targets.ndim not in (1, 2) or len(targets) != len(tokens) or targets.numel() == 0:
        raise RequestRejected(
            f"{where}.target_tokens has shape {tuple(targets.shape)}, model_input {len(tokens)} tokens. "
            "Send one target (or one row of K targets) for each input token: the one that follows it."
        )
    _check_range(targets, f"{where}.target_tokens", sizes.vocab_size)
    given = {name: tensor for name, tensor in inputs.items() if name != "target_tokens"}
    return Datum(tokens, targets, _parse_loss_inputs(given, targets, where, kernel))


def _parse_loss_inputs(given: Mapping[str, Any], targets: Tensor, where: str, kernel: Kernel) -> dict[str, Tensor]:
    allowed = {wire for wire, name in _LOSS_INPUTS.items() if name in kernel.inputs}
    if unknown := sorted(set(given) - allowed):
        raise RequestRejected(
            f"{where}.loss_fn_inputs has {', '.join(unknown)}, which the loss {kernel.name} does not take. "
            f"Send target_tokens and {', '.join(sorted(allowed))}."
        )
    tensors = {}
    for wire in sorted(allowed):
        if wire in given:
            tensor = _parse_tensor(given[wire], f"{where}.{wire}", np.dtype(np.float32))
        elif wire == "weights":
            tensor = torch.ones(targets.shape)  # as the client counts response tokens when there are no weights
        else:
            raise RequestRejected(f"{where}.loss_fn_inputs lacks {wire}, which the loss {kernel.name} needs.")
        if tensor.shape != targets.shape:
            raise RequestRejected(
                f"{where}.{wire} has shape {tuple(tensor.shape)}, target_tokens {tuple(targets.shape)}. "
                "Send one number for each target token."
            )
        tensors[_LOSS_INPUTS[wire]] = tensor
    return tensors


def _parse_tokens(model_input: Any, where: str, sizes: Sizes) -> Tensor:
    chunks = model_input.get("chunks") if isinstance(model_input, dict) else None
    if not isinstance(chunks, list):
        raise RequestRejected(f"{where}.model_input must hold chunks, got {_short(model_input)}.")
    ids: list[int] = []
    for chunk in chunks:
        if not isinstance(chunk, dict) or not isinstance(chunk.get("tokens"), list):
            kind = chunk.get("type") if isinstance(chunk, dict) else chunk
            raise RequestRejected(f"{where} has a chunk of type {kind!r}; this trainer takes encoded_text chunks only.")
        ids += chunk["tokens"]
    tokens = _to_array(ids, f"{where}.model_input", np.dtype(np.int64))
    if not 1 <= len(tokens) <= sizes.max_tokens:
        raise RequestRejected(
            f"{where} has {len(tokens)} tokens, this trainer takes 1 to {sizes.max_tokens} a datum "
            "(max_context_length). Truncate it or drop it."
        )
    tensor = torch.from_numpy(tokens)
    _check_range(tensor, f"{where}.model_input", sizes.vocab_size)
    return tensor


def _check_range(tokens: Tensor, where: str, vocab_size: int) -> None:
    is_wrong = (tokens < 0) | (tokens >= vocab_size)
    if bool(is_wrong.any()):
        index = int(is_wrong.flatten().nonzero()[0])
        raise RequestRejected(
            f"{where}[{index}] is {int(tokens.flatten()[index])}, outside the vocabulary 0..{vocab_size - 1}. "
            "Tokenize with this model's tokenizer; untrained positions need a valid target and weight 0."
        )


def _parse_tensor(value: Any, where: str, dtype: np.dtype[Any]) -> Tensor:
    """A TensorData object, dense or CSR, as a tensor of its shape."""
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise RequestRejected(f"{where} must be a tensor object with a list `data`, got {_short(value)}.")
    data = _to_array(value["data"], where, dtype)
    shape = value.get("shape")
    if shape is None:
        return torch.from_numpy(data)
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise RequestRejected(f"{where}.shape must be a list of sizes, got {_short(shape)}.")
    if value.get("sparse_crow_indices") is not None:
        return torch.from_numpy(_dense_from_csr(value, data, shape, where))
    if math.prod(shape) != data.size:
        raise RequestRejected(f"{where} has {data.size} numbers, its shape {shape} wants {math.prod(shape)}.")
    return torch.from_numpy(data.reshape(shape))


def _dense_from_csr(value: Parsed, data: _Array, shape: list[int], where: str) -> _Array:
    crow = _to_array(value["sparse_crow_indices"], f"{where}.sparse_crow_indices", np.dtype(np.int64))
    columns = _to_array(value.get("sparse_col_indices"), f"{where}.sparse_col_indices", np.dtype(np.int64))
    counts = np.diff(crow)
    is_sound = (
        len(shape) == 2
        and len(crow) == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == len(columns) == data.size
        and not (counts < 0).any()
        and not ((columns < 0) | (columns >= shape[1])).any()
    )
    if not is_sound:
        raise RequestRejected(f"{where} is not a valid CSR tensor of shape {shape}.")
    dense = np.zeros(shape, data.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = data
    return dense


def _to_array(numbers: Any, where: str, dtype: np.dtype[Any]) -> _Array:
    """A flat list of finite numbers as an array; whole numbers for an integer dtype."""
    kinds = "iu" if dtype.kind == "i" else "iuf"
    try:
        array = np.asarray(numbers)
    except (ValueError, OverflowError):  # ragged lists
        array = np.asarray(None)
    if array.size == 0:
        return np.zeros(0, dtype)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        what = "whole numbers" if dtype.kind == "i" else "numbers"
        index, wrong = _first_not_a_number(numbers, dtype)
        raise RequestRejected(f"{where} must be a flat list of {what}; element {index} is {_short(wrong)}.")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.isfinite(converted).all():
        index = int(np.flatnonzero(~np.isfinite(converted))[0])
        raise RequestRejected(f"{where}[{index}] is {array[index]}, too large for {dtype.name}.")
    return converted


def _first_not_a_number(numbers: Any, dtype: np.dtype[Any]) -> tuple[int, Any]:
    allowed = int if dtype.kind == "i" else (int, float)
    for index, number in enumerate(numbers if isinstance(numbers, list) else [numbers]):
        if not isinstance(number, allowed) or isinstance(number, bool) or abs(number) >= 2**63:
            return index, number
    return 0, numbers


def _tensor_answer(values: Tensor, dtype: str) -> Parsed:
    return {"data": values.contiguous().flatten().numpy(), "dtype": dtype, "shape": list(values.shape)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
