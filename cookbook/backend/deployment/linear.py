"""Linear layers for inference: weights in the layout that the matrix library likes best, LoRA beside them.

Suffixes: M tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from cookbook.errors import ModelError

__all__ = ["Linear", "LoraWeights"]

_TYPICAL_TOKENS = 64


@dataclass(frozen=True)
class LoraWeights:
    """Float32 factors of one adapted layer; the scale is in `b_OR`."""

    a_RI: Tensor
    b_OR: Tensor


class Linear:
    """x @ w.T + bias, plus x @ a.T @ b.T of an adapter. Output in the dtype of the weight."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self.num_inputs, self.num_outputs = weight_OI.shape[1], weight_OI.shape[0]
        self.dtype = weight_OI.dtype
        self.bias_O = bias_O
        self._is_packed = _can_pack(self.dtype)
        self._weight = _pack(weight_OI) if self._is_packed else weight_OI.contiguous()
        self._lora: tuple[Tensor, Tensor] | None = None

    def __call__(self, x_MI: Tensor) -> Tensor:
        if self._is_packed:
            y_MO = torch.ops.mkldnn._linear_pointwise(x_MI, self._weight, self.bias_O, "none", [], "")
        else:
            y_MO = functional.linear(x_MI, self._weight, self.bias_O)
        if self._lora is not None:
            a_IR, b_RO = self._lora
            y_MO.addmm_(x_MI @ a_IR, b_RO)
        return cast(Tensor, y_MO)

    def with_lora(self, parts: Sequence[LoraWeights | None], sizes: Sequence[int], folder: Path) -> Linear:
        """The same layer with an adapter on each of its stacked parts, whose output sizes are `sizes`."""
        found = [part for part in parts if part is not None]
        a_RI = torch.cat([part.a_RI for part in found])
        b_OR = torch.zeros(self.num_outputs, len(a_RI))
        row = column = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                rank = len(part.a_RI)
                if part.a_RI.shape[1] != self.num_inputs or part.b_OR.shape != (size, rank):
                    raise ModelError(
                        f"the adapter in {folder} has factors {tuple(part.a_RI.shape)} and {tuple(part.b_OR.shape)} "
                        f"for a layer of {self.num_inputs} inputs and {size} outputs. Use an adapter of this model."
                    )
                b_OR[row : row + size, column : column + rank] = part.b_OR
                column += rank
            row += size
        layer = self.without_lora()
        layer._lora = (a_RI.T.to(self.dtype).contiguous(), b_OR.T.to(self.dtype).contiguous())
        return layer

    def without_lora(self) -> Linear:
        """The same layer, its weight shared."""
        layer = object.__new__(Linear)
        layer.__dict__.update(self.__dict__)
        layer._lora = None
        return layer


def _can_pack(dtype: torch.dtype) -> bool:
    """Repacking at each call, as functional.linear does, costs as much as the product when rows are few."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(weight_OI: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _TYPICAL_TOKENS))
