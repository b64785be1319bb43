"""Decoder for sampling: Llama-shaped models from Hugging Face folders, with a cache, and LoRA adapters unmerged.

Numbers follow the trainer's decoder: the residual stream, norms and the head in float32, the rest in the compute dtype.
Which sequences run when is the engine's matter.
Suffixes: B rows or M packed tokens, H hidden, Q query heads, G key/value heads, D head dimension, T positions,
V vocabulary in whole blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cookbook.backend.decoder import ComputeDtype
from cookbook.backend.deployment.cache import CacheShape, DecodeRows, Prompt
from cookbook.backend.deployment.folder import ModelShape, ModelTensors, read_adapter, read_shape
from cookbook.backend.deployment.linear import Linear, LoraWeights
from cookbook.backend.deployment.sampling import BLOCK
from cookbook.errors import ModelError

__all__ = ["LlamaModel", "PromptPiece"]

_POSITIONS_STEP = 16

_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PromptPiece:
    """The next `count` tokens of a prompt whose first `prompt.filled` have keys and values."""

    prompt: Prompt
    count: int


@dataclass(frozen=True)
class _Layer:
    attention_norm_H: Tensor
    qkv: Linear
    query_norm_D: Tensor | None
    key_norm_D: Tensor | None
    out: Linear
    mlp_norm_H: Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """Weights never change: a new adapter or new weights are a new LlamaModel. Call under torch.inference_mode()."""

    def __init__(self, shape: ModelShape, tensors: ModelTensors, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.embedding_VH = tensors.get("model.embed_tokens.weight")
        self.final_norm_H = tensors.get("model.norm.weight").float()
        self.layers = [_read_layer(shape, tensors, f"model.layers.{n}.", dtype) for n in range(shape.num_layers)]
        self.head = _read_head(shape, tensors, self.embedding_VH)
        self.cos_TD, self.sin_TD = _rotations(shape, 2 * _POSITIONS_STEP)

    @classmethod
    def load(cls, folder: Path, compute_dtype: ComputeDtype) -> LlamaModel:
        """Read a model folder. ModelError names what is missing or of another kind than computed here."""
        with torch.inference_mode():
            shape = read_shape(folder)
            with ModelTensors(folder, compute_dtype) as tensors:
                return cls(shape, tensors, getattr(torch, compute_dtype))

    def with_adapter(self, folder: Path) -> LlamaModel:
        """This model with the LoRA adapter of a PEFT folder in place of any other; the base weights are shared."""
        with torch.inference_mode():
            adapter = read_adapter(folder)
            model = self.without_adapter()
            model.layers = [
                _adapted(layer, self.shape, adapter.of_layer(n), folder) for n, layer in enumerate(model.layers)
            ]
            if head := adapter.of_head():
                model.head = model.head.with_lora([head], [self.shape.vocab_size], folder)
            adapter.check_all_used()
            return model

    def without_adapter(self) -> LlamaModel:
        """The base model; weights are shared."""
        model = copy.copy(self)
        model.head = self.head.without_lora()
        model.layers = [
            _Layer(
                layer.attention_norm_H,
                layer.qkv.without_lora(),
                layer.query_norm_D,
                layer.key_norm_D,
                layer.out.without_lora(),
                layer.mlp_norm_H,
                layer.gate_up.without_lora(),
                layer.down.without_lora(),
            )
            for layer in self.layers
        ]
        return model

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(self.shape.num_layers, self.shape.num_kv_heads, self.shape.head_dim, self.dtype)

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_positions(self) -> int:
        return self.shape.max_positions

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """Float32 (B, V) in whole blocks; columns beyond the vocabulary are -inf."""
        logits_BV = self.head(hidden_BH)
        logits_BV[:, self.shape.vocab_size :] = -torch.inf
        return logits_BV

    def decode(self, tokens_B: Tensor, positions_B: Tensor, rows: DecodeRows) -> Tensor:
        """One more token in each of the first B rows. Returns float32 (B, H) and fills position `positions_B`."""
        num_rows, capacity = len(tokens_B), rows.values_LRGTD.shape[3]
        last = int(positions_B.max()) + 1
        length = min(capacity, -(-last // _POSITIONS_STEP) * _POSITIONS_STEP)
        mask_B11T = torch.zeros(num_rows, 1, 1, length)
        mask_B11T.masked_fill_((torch.arange(length) > positions_B[:, None])[:, None, None], -torch.inf)
        heads = torch.arange(num_rows * self.shape.num_kv_heads).view(num_rows, -1)
        value_places = (heads * capacity + positions_B[:, None]).view(-1)
        lines_BGD = heads[..., None] * self.shape.head_dim + torch.arange(self.shape.head_dim)
        key_places = (lines_BGD * capacity + positions_B[:, None, None]).view(-1)
        scale = self.shape.head_dim**-0.5

        def attend(layer: int, query_BQD: Tensor, key_BGD: Tensor, value_BGD: Tensor) -> Tensor:
            keys_BGDT, values_BGTD = rows.keys_LRGDT[layer, :num_rows], rows.values_LRGTD[layer, :num_rows]
            keys_BGDT.view(-1).put_(key_places, key_BGD.reshape(-1))
            values_BGTD.view(-1, self.shape.head_dim).index_copy_(0, value_places, value_BGD.flatten(0, 1))
            grouped = query_BQD.reshape(num_rows, self.shape.num_kv_heads, -1, self.shape.head_dim)
            scores = torch.matmul(grouped, keys_BGDT[..., :length])
            shares = torch.add(mask_B11T, scores, alpha=scale).softmax(-1).to(self.dtype)
            return torch.matmul(shares, values_BGTD[:, :, :length]).view(num_rows, -1)

        return self._run(tokens_B, positions_B, attend)

    def prefill(self, pieces: Sequence[PromptPiece]) -> Tensor:
        """Fill in keys and values of these pieces. Returns float32 (M, H), the pieces one after another."""
        tokens_M = torch.cat([_piece_tokens(piece) for piece in pieces])
        positions_M = torch.cat([torch.arange(p.prompt.filled, p.prompt.filled + p.count) for p in pieces])
        masks = [self._piece_mask(piece) for piece in pieces]

        def attend(layer: int, query_MQD: Tensor, key_MGD: Tensor, value_MGD: Tensor) -> Tensor:
            outputs, at = [], 0
            for piece, mask in zip(pieces, masks, strict=True):
                part = slice(at, at + piece.count)
                outputs.append(self._attend_piece(layer, piece, mask, query_MQD[part], key_MGD[part], value_MGD[part]))
                at += piece.count
            return torch.cat(outputs)

        hidden_MH = self._run(tokens_M, positions_M, attend)
        for piece in pieces:
            piece.prompt.filled += piece.count
        return hidden_MH

    def _piece_mask(self, piece: PromptPiece) -> Tensor:
        """(queries a key head x count, T), so that the queries that share a key head stand side by side."""
        total = piece.prompt.filled + piece.count
        visible = torch.arange(total) <= torch.arange(piece.prompt.filled, total)[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -torch.inf)
        return mask.repeat(self.shape.num_heads // self.shape.num_kv_heads, 1)

    def _attend_piece(
        self, layer: int, piece: PromptPiece, mask: Tensor, query_MQD: Tensor, key_MGD: Tensor, value_MGD: Tensor
    ) -> Tensor:
        prompt, start, stop = piece.prompt, piece.prompt.filled, piece.prompt.filled + piece.count
        prompt.keys_LGDT[layer, :, :, start:stop] = key_MGD.permute(1, 2, 0)
        prompt.values_LGTD[layer, :, start:stop] = value_MGD.transpose(0, 1)
        grouped = query_MQD.transpose(0, 1).reshape(1, self.shape.num_kv_heads, -1, self.shape.head_dim)
        keys = prompt.keys_LGDT[None, layer, :, :, :stop].transpose(2, 3).contiguous()
        values = prompt.values_LGTD[None, layer, :, :stop]
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return attended.view(self.shape.num_heads, piece.count, -1).transpose(0, 1).reshape(piece.count, -1)

    def _run(self, tokens_M: Tensor, positions_M: Tensor, attend: _Attend) -> Tensor:
        shape = self.shape
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        x_MH = functional.embedding(tokens_M, self.embedding_VH).float()
        cos_M1D, sin_M1D = self._rotations_at(positions_M)
        for number, layer in enumerate(self.layers):
            normed_MH = functional.rms_norm(x_MH, (shape.hidden_size,), layer.attention_norm_H, shape.eps)
            qkv = layer.qkv(normed_MH.to(self.dtype))
            turned, value = torch.split(qkv, [query_size + kv_size, kv_size], dim=1)
            turned = turned.view(len(x_MH), -1, shape.head_dim)
            if layer.query_norm_D is not None and layer.key_norm_D is not None:
                turned = self._normed_heads(turned, layer.query_norm_D, layer.key_norm_D)
            turned = _rotate(turned.float(), cos_M1D, sin_M1D).to(self.dtype)
            query, key = torch.split(turned, [shape.num_heads, shape.num_kv_heads], dim=1)
            attended = attend(number, query, key, value.view(len(x_MH), -1, shape.head_dim))
            x_MH += layer.out(attended)
            normed_MH = functional.rms_norm(x_MH, (shape.hidden_size,), layer.mlp_norm_H, shape.eps)
            gate, up = layer.gate_up(normed_MH.to(self.dtype)).chunk(2, dim=1)
            x_MH += layer.down(functional.silu(gate).mul_(up))
        return functional.rms_norm(x_MH, (shape.hidden_size,), self.final_norm_H, shape.eps)

    def _normed_heads(self, turned: Tensor, query_norm_D: Tensor, key_norm_D: Tensor) -> Tensor:
        query, key = torch.split(turned.float(), [self.shape.num_heads, self.shape.num_kv_heads], dim=1)
        size = (self.shape.head_dim,)
        query = functional.rms_norm(query, size, query_norm_D, self.shape.eps)
        return torch.cat([query, functional.rms_norm(key, size, key_norm_D, self.shape.eps)], dim=1)

    def _rotations_at(self, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        if (needed := int(positions_M.max()) + 1) > len(self.cos_TD):
            self.cos_TD, self.sin_TD = _rotations(self.shape, 2 * needed)
        return self.cos_TD[positions_M][:, None], self.sin_TD[positions_M][:, None]


def _piece_tokens(piece: PromptPiece) -> Tensor:
    start = piece.prompt.filled
    return torch.from_numpy(piece.prompt.array[start : start + piece.count])


def _rotations(shape: ModelShape, num_positions: int) -> tuple[Tensor, Tensor]:
    angles_TD = torch.arange(num_positions, dtype=torch.float32)[:, None] * shape.inverse_frequencies
    return angles_TD.cos(), angles_TD.sin()


def _rotate(x_MQD: Tensor, cos_M1D: Tensor, sin_M1D: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), first and second half of a head as pairs."""
    first, second = x_MQD.chunk(2, dim=-1)
    turned_first = (first * cos_M1D).addcmul_(second, sin_M1D, value=-1)
    turned_second = (second * cos_M1D).addcmul_(first, sin_M1D)
    return torch.cat([turned_first, turned_second], dim=-1)


def _read_layer(shape: ModelShape, tensors: ModelTensors, prefix: str, dtype: torch.dtype) -> _Layer:
    def linear(*names: str) -> Linear:
        weight = torch.cat([tensors.rounded(f"{prefix}{name}.weight") for name in names])
        biases = [tensors.find(f"{prefix}{name}.bias") for name in names]
        if all(bias is None for bias in biases):
            return Linear(weight, None)
        return Linear(
            weight, torch.cat([_bias(b, f"{prefix}{n}") for n, b in zip(names, biases, strict=True)]).to(dtype)
        )

    def norm(name: str) -> Tensor | None:
        weight = tensors.find(f"{prefix}{name}.weight")
        return None if weight is None else weight.float()

    return _Layer(
        attention_norm_H=tensors.get(f"{prefix}input_layernorm.weight").float(),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        query_norm_D=norm("self_attn.q_norm"),
        key_norm_D=norm("self_attn.k_norm"),
        out=linear("self_attn.o_proj"),
        mlp_norm_H=tensors.get(f"{prefix}post_attention_layernorm.weight").float(),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def _bias(bias: Tensor | None, name: str) -> Tensor:
    if bias is None:
        raise ModelError(f"{name} has no bias while its neighbours have one: this shape of model is not served here.")
    return bias


def _read_head(shape: ModelShape, tensors: ModelTensors, embedding_VH: Tensor) -> Linear:
    weight = embedding_VH if shape.is_tied else tensors.get("lm_head.weight")
    if missing := -len(weight) % BLOCK:
        weight = functional.pad(weight, (0, 0, 0, missing))
    return Linear(weight.float(), None)


def _adapted(layer: _Layer, shape: ModelShape, parts: dict[str, LoraWeights], folder: Path) -> _Layer:
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def lora(linear: Linear, names: Sequence[str], sizes: Sequence[int]) -> Linear:
        found = [parts.get(name) for name in names]
        return linear.with_lora(found, sizes, folder) if any(found) else linear

    return _Layer(
        layer.attention_norm_H,
        lora(layer.qkv, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [query, kv, kv]),
        layer.query_norm_D,
        layer.key_norm_D,
        lora(layer.out, ["self_attn.o_proj"], [shape.hidden_size]),
        layer.mlp_norm_H,
        lora(layer.gate_up, ["mlp.gate_proj", "mlp.up_proj"], [shape.intermediate_size] * 2),
        lora(layer.down, ["mlp.down_proj"], [shape.hidden_size]),
    )
