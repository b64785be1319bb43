"""The decoder behind trainers: token ids in, hidden states and float32 logits out.

One protocol, implemented on transformers models. Losses, batching and optimizers are not here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cookbook.backend.branches import ATTENTION, Forest, Tree, register
from cookbook.errors import ModelError

__all__ = ["ComputeDtype", "Decoder", "HuggingFaceDecoder", "dithered", "pick_compute_dtype", "read_config"]

ComputeDtype = Literal["float32", "bfloat16"]

# A head with any of these is not logits = hidden @ weight.T: gradients of a chunked head would be wrong.
_HEAD_FIELDS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
_NOISE_SIZE = 2**22
_PROBE_TOKENS = 8


class Decoder(Protocol):
    """A causal language model without dropout.

    Suffixes: N rows, T positions, M any positions, H hidden, V vocabulary.
    """

    vocab_size: int
    max_positions: int
    shares_prefixes: bool
    """Whether `forest_hidden_states` may be called."""

    def hidden_states(self, tokens_NT: Tensor) -> Tensor:
        """Float32 or bfloat16 (N, T, H) before the head, with graph. Position t sees tokens 0..t only."""
        ...

    def forest_hidden_states(self, tokens_M: Tensor, forest: Forest) -> Tensor:
        """The same, (M, H), for sequences that share prefixes. Each position sees its own sequence only."""
        ...

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Within it no weight changes, so that what is derived from weights alone may be computed once."""
        ...

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Float32 (M, V)."""
        ...


def pick_compute_dtype() -> ComputeDtype:
    """bfloat16 where this CPU multiplies bfloat16 matrices in hardware, else float32."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bf16 else "float32"


def read_config(folder: Path) -> Any:
    """The model's Hugging Face config. ModelError when there is none, or when such a model cannot be trained here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder} is not a Hugging Face model folder that transformers can read: {reason}") from error
    for field in _EXPERT_FIELDS:
        if getattr(config, field, None):
            raise ModelError(
                f"{folder} is a mixture of experts ({field}={getattr(config, field)}), which cannot be trained here. "
                "Choose a dense model."
            )
    for field in _HEAD_FIELDS:
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{folder} rescales its logits ({field}={getattr(config, field)}), which this trainer does not do. "
                "Choose a model whose head is a plain linear layer."
            )
    return config


class HuggingFaceDecoder:
    """Decoder on a transformers model held in `model`; `transformer` is the part below the head.

    Master weights are float32. With compute dtype bfloat16 matrix products of the transformer run in bfloat16 under
    autocast, with weights rounded by `dithered`. Logits are float32 products, because the log-softmax over a large
    vocabulary loses too much otherwise; the gradients of the head's input and weight are bfloat16 products, as all
    others are.
    """

    def __init__(self, model: Any, compute_dtype: ComputeDtype) -> None:
        self.model = model.eval()  # evaluation mode: dropout would make the two passes of a custom loss differ
        self.compute_dtype = compute_dtype
        self.vocab_size = int(self.model.config.vocab_size)
        self.max_positions = int(self.model.config.max_position_embeddings)
        self.shares_prefixes = False

    @classmethod
    def load(cls, folder: Path, compute_dtype: ComputeDtype) -> HuggingFaceDecoder:
        """Read a model folder in float32, all parameters frozen. ModelError when it cannot be trained here."""
        from transformers import AutoModelForCausalLM

        config = read_config(folder)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the model in {folder}: {error}") from error
        if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
            raise ModelError(f"{folder} lacks {len(missing)} of its weights, first {missing[0]}: copy the model again.")
        model.requires_grad_(False)
        decoder = cls(model, compute_dtype)
        decoder.check_trainable(folder)
        decoder.share_prefixes()
        if compute_dtype == "bfloat16":
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and module is not decoder.head:
                    model.set_submodule(name, _DitheredLinear.of(module))
            model.set_output_embeddings(_MixedHead.of(decoder.head))
        return decoder

    def compress(self) -> None:
        """For weights that stay frozen: keep what bfloat16 compute would round anyway in bfloat16, at half the memory.

        The head, and with it a tied embedding, stays in float32, as it computes in float32.
        """
        for module in self.model.modules():
            if isinstance(module, _DitheredLinear):
                module.weight.data = dithered(module.weight.data)

    @property
    def head(self) -> nn.Module:
        """The output layer, adapters included."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def hidden_states(self, tokens_NT: Tensor) -> Tensor:
        transformer = getattr(self.model, self.model.base_model_prefix)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.compute_dtype == "bfloat16"):
            return cast(Tensor, transformer(input_ids=tokens_NT, use_cache=False).last_hidden_state)

    def forest_hidden_states(self, tokens_M: Tensor, forest: Forest) -> Tensor:
        transformer = getattr(self.model, self.model.base_model_prefix)
        unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # else transformers would make one of M x M
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.compute_dtype == "bfloat16"):
            output = transformer(
                input_ids=tokens_M[None],
                position_ids=forest.positions()[None],
                attention_mask=unused_mask,
                use_cache=False,
                forest=forest,
            )
        return cast(Tensor, output.last_hidden_state[0])

    def logits(self, hidden_MH: Tensor) -> Tensor:
        return cast(Tensor, self.head(hidden_MH.float()))

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        layers = [module for module in self.model.modules() if isinstance(module, _DitheredLinear)]
        for layer in layers:
            layer.keeps_rounded = True
        try:
            yield
        finally:
            for layer in layers:
                layer.keeps_rounded, layer.rounded = False, None

    @torch.no_grad()
    def share_prefixes(self) -> None:
        """Set `shares_prefixes`: whether this model's attention is a plain one, by its config and by a try."""
        config = self.model.config
        is_windowed = getattr(config, "sliding_window", None) is not None or any(
            kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()
        )
        if is_windowed or config._attn_implementation != "sdpa":
            return
        register()
        self.model.set_attn_implementation(ATTENTION)
        forest = Forest([Tree(3, (2, 4)), Tree(2, (1, 2))])
        tokens_M = torch.randint(self.vocab_size, (forest.num_tokens,), generator=torch.Generator().manual_seed(0))
        exact = HuggingFaceDecoder(self.model, "float32")
        try:
            together = exact.forest_hidden_states(tokens_M, forest)
        except (TypeError, ValueError, RuntimeError):  # a model that hands nothing on to its attention
            together = torch.zeros(0)
        self.shares_prefixes = len(together) == len(tokens_M) and all(
            torch.allclose(together[places_T], exact.hidden_states(tokens_M[None, places_T])[0], atol=1e-3, rtol=1e-3)
            for places_T in forest.sequences()
        )
        if not self.shares_prefixes:
            self.model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def check_trainable(self, folder: Path) -> None:
        """Try on a few tokens what training relies on: a plain linear head, and causality. ModelError otherwise."""
        generator = torch.Generator().manual_seed(0)
        tokens_NT = torch.randint(self.vocab_size, (1, _PROBE_TOKENS), generator=generator)
        whole = self.model(input_ids=tokens_NT, use_cache=False).logits
        exact = HuggingFaceDecoder(self.model, "float32")
        ours = exact.logits(exact.hidden_states(tokens_NT))
        if not torch.allclose(whole.float(), ours, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"the logits of {folder} are not a plain linear function of its hidden states, which this trainer "
                "needs. Choose a model without soft-capping or scaling of logits."
            )
        half = _PROBE_TOKENS // 2
        prefix = exact.logits(exact.hidden_states(tokens_NT[:, :half]))
        if not torch.allclose(prefix, ours[:, :half], atol=1e-3, rtol=1e-3):
            raise ModelError(f"{folder} is not a causal model: later tokens change earlier logits. Choose a decoder.")


def dithered(weight: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down so that the mean over many elements is right.

    A checkpoint stored in bfloat16 comes back unchanged. After a step of less than half a bfloat16 digit (0.2 to 0.4%
    of a weight), rounding to nearest would give the old weight again, as it does for most weights in the first steps of
    fine-tuning; here a share of the weights moves by a whole digit instead, and the model sees the step. This is
    stochastic rounding (Gupta et al. 2015, arXiv:1502.02551) with noise that is fixed for each place in a tensor: the
    same weights give the same bits.
    """
    exact = weight.contiguous().view(-1)
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    for part, into in zip(torch.split(exact, _NOISE_SIZE), torch.split(rounded, _NOISE_SIZE), strict=True):
        bits = part.view(torch.int32) + _noise()[: len(part)]
        into.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
    return rounded.view(weight.shape)


@functools.cache
def _noise() -> Tensor:
    """int32 (_NOISE_SIZE,), uniform over the 16 bits that bfloat16 lacks; larger tensors use it again and again."""
    return torch.randint(2**16, (_NOISE_SIZE,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


class _Dithered(torch.autograd.Function):
    """`dithered`, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return dithered(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].float()


class _SharingLinear(nn.Linear):
    """A linear layer that computes in another way and shares its parameters with the layer whose place it takes."""

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """The same layer. ModelError when it is not linear."""
        if type(layer) is not nn.Linear:
            raise ModelError(f"the model's head is a {type(layer).__name__}, not a linear layer. Choose another model.")
        ours = cls(1, 1, bias=False, device="meta")
        ours.in_features, ours.out_features = layer.in_features, layer.out_features
        ours.weight, ours.bias = layer.weight, layer.bias
        return ours


class _DitheredLinear(_SharingLinear):
    """For use under autocast: rounds its weight by `dithered`, unless it is in bfloat16 already."""

    keeps_rounded = False
    rounded: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self.rounded is not None:
            weight = self.rounded
        elif weight.dtype == torch.float32:
            weight = _Dithered.apply(weight)  # type: ignore[no-untyped-call]
            self.rounded = weight if self.keeps_rounded else None
        return nn.functional.linear(input, weight, self.bias)


class _MixedHead(_SharingLinear):
    """A linear layer with float32 outputs, whose two backward products run in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _MixedProduct.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]


class _MixedProduct(torch.autograd.Function):
    """x @ w.T + b for M rows, I inputs and O outputs."""

    @staticmethod
    def forward(ctx: Any, input_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_MI, weight_OI)
        return nn.functional.linear(input_MI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input_MI, weight_OI = ctx.saved_tensors
        (gradient_MO,) = gradients
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rounded_MO = gradient_MO.bfloat16()
        return (
            (rounded_MO @ weight_OI.bfloat16()).float() if needs_input else None,
            (rounded_MO.T @ input_MI.bfloat16()).float() if needs_weight else None,
            gradient_MO.sum(0) if needs_bias else None,
        )
