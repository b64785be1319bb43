"""One forward or forward-backward over a request's datums: micro-batches, a chunked head, gradients into `.grad`.

Suffixes: N rows of a micro-batch, T padded positions, M positions computed (no padding, and a shared prefix once), P
(position, target) pairs, H hidden, V vocabulary. Which weights are trained and what becomes of the gradients is not
decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cookbook.backend.branches import Forest
from cookbook.backend.decoder import Decoder
from cookbook.backend.trainer.prefix import prefix_groups, shared_batches
from cookbook.errors import RequestRejected
from cookbook.losses import Kernel, LossConfig, LossInput

__all__ = ["BatchResult", "Datum", "TopK", "forward", "forward_backward", "micro_batches", "top_k"]

TOKENS_PER_MICRO_BATCH = 2048
"""Padded tokens that pass through the decoder together; a longer datum passes alone."""

_LOGITS_PER_CHUNK = 2**25  # 128 MiB of float32: large enough for fast matrix products, small beside the weights
_LOGITS_KEPT = 2**27  # 512 MiB: logits kept from the forward to the backward pass; more are computed again


@dataclass(frozen=True)
class Datum:
    """One training sequence. tokens: int64 (T,). targets: int64 (T,) or (T, K). loss_inputs: float32, as targets."""

    tokens: Tensor
    targets: Tensor
    loss_inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchResult:
    """logprobs: per datum, float32, shape of its targets, in nats. Metrics are keyed `name:reduction`."""

    logprobs: list[Tensor]
    metrics: dict[str, float]
    num_loss_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class TopK:
    """Per datum (T, K), most probable first: float32 logprobs in nats and int64 token ids."""

    logprobs: list[Tensor]
    indices: list[Tensor]


def forward(decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig) -> BatchResult:
    """Logprobs of all targets, and the loss as a metric. No gradients."""
    with torch.no_grad(), decoder.fixed_weights():
        return _run(decoder, data, kernel, config, backward=False)


def forward_backward(decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig) -> BatchResult:
    """As `forward`, and adds the gradient of the raw loss sum to the `.grad` of the parameters that require it.

    Raises:
        RequestRejected: a logprob, the loss or its gradient is not finite. `.grad` may hold a part of the gradient
            after any exception: the caller throws it away.
    """
    with decoder.fixed_weights():
        return _run(decoder, data, kernel, config, backward=True)


def top_k(decoder: Decoder, data: Sequence[Datum], k: int) -> TopK:
    """The k most probable next tokens at every position."""
    logprobs: list[Tensor] = [torch.empty(0)] * len(data)
    indices: list[Tensor] = [torch.empty(0)] * len(data)
    with torch.no_grad():
        for rows in micro_batches([len(datum.tokens) for datum in data]):
            hidden_MH = _hidden(decoder, [data[row].tokens for row in rows])
            parts = [_top_k_chunk(decoder.logits(chunk), k) for chunk in _in_chunks(hidden_MH, _chunk_size(decoder))]
            lengths = [len(data[row].tokens) for row in rows]
            values = torch.cat([part[0] for part in parts]).split_with_sizes(lengths)
            tokens = torch.cat([part[1] for part in parts]).split_with_sizes(lengths)
            for row, row_values, row_tokens in zip(rows, values, tokens, strict=True):
                logprobs[row], indices[row] = row_values, row_tokens
    return TopK(logprobs, indices)


def micro_batches(lengths: Sequence[int], budget: int = TOKENS_PER_MICRO_BATCH) -> list[list[int]]:
    """Row numbers grouped so that rows x longest row <= budget, longest first; a longer row is alone.

    A function of the lengths alone, so that the same request is computed in the same way whatever else is queued.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups


def _run(decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig, *, backward: bool) -> BatchResult:
    logprobs: list[Tensor] = [torch.empty(0)] * len(data)
    metrics = {"loss:sum": 0.0}
    num_loss_tokens = num_sequences = 0
    loss_tokens = [_loss_tokens(kernel, datum) for datum in data]
    for rows, hidden_MH, places in _hidden_batches(decoder, [datum.tokens for datum in data]):
        batch = [data[row] for row in rows]
        trained = [loss_tokens[row] for row in rows]
        head = _Head(decoder, hidden_MH, places, batch, trained if backward else None)
        row_logprobs = head.logprobs()
        gradients = []
        for row, datum, values in zip(rows, batch, row_logprobs, strict=True):
            gradient, row_metrics = _evaluate(kernel, config, datum, values, row)
            gradients.append(gradient)
            logprobs[row] = values
            for key, value in row_metrics.items():
                metrics[key] = metrics.get(key, 0.0) + value
        if backward:
            head.backward(gradients)
        num_loss_tokens += sum(int(mask.sum()) for mask in trained)
        num_sequences += sum(bool(mask.any()) for mask in trained)
    metrics |= {"num_loss_tokens:sum": float(num_loss_tokens), "num_sequences:sum": float(num_sequences)}
    return BatchResult(logprobs, metrics, num_loss_tokens, num_sequences)


def _loss_tokens(kernel: Kernel, datum: Datum) -> Tensor:
    """Shape checks of all loss inputs happen here, before anything is computed."""
    record = LossInput(datum.targets, **datum.loss_inputs)
    for name in kernel.inputs:
        record.required(name)
    return kernel.loss_tokens(record)


def _evaluate(
    kernel: Kernel, config: LossConfig, datum: Datum, logprobs: Tensor, row: int
) -> tuple[Tensor, dict[str, float]]:
    """d loss / d logprob of one datum, and its metrics."""
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        output = kernel.formula(LossInput(leaf, **datum.loss_inputs), config)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
    loss = output.loss.item()
    if not (math.isfinite(loss) and bool(logprobs.isfinite().all()) and bool(gradient.isfinite().all())):
        raise RequestRejected(
            f"datum {row} has a {kernel.name} loss of {loss}, and its logprobs are from {float(logprobs.min())} to "
            f"{float(logprobs.max())}: nothing was added to the gradients. Check the datum's weights, advantages and "
            "logprobs; if they are sound, the weights of the model have diverged: load an earlier checkpoint."
        )
    return gradient, {"loss:sum": loss, **output.metrics}


def _hidden_batches(
    decoder: Decoder, sequences: Sequence[Tensor]
) -> Iterator[tuple[Sequence[int], Tensor, list[Tensor]]]:
    """Micro-batches: rows, (M, H) hidden states, and for each row the indices into M of its positions.

    Rows that begin alike, as the completions of one prompt do, share the hidden states of what they begin with.
    """
    lengths = [len(tokens) for tokens in sequences]
    groups = prefix_groups(sequences) if decoder.shares_prefixes else []
    for batch in shared_batches(groups, lengths, TOKENS_PER_MICRO_BATCH):
        forest = Forest([group.tree(lengths) for group in batch])
        tokens_M = torch.cat([group.tokens(sequences) for group in batch])
        rows = [row for group in batch for row in group.rows]
        yield rows, decoder.forest_hidden_states(tokens_M, forest), forest.sequences()
    shared = {row for group in groups for row in group.rows}
    others = [row for row in range(len(sequences)) if row not in shared]
    for numbers in micro_batches([lengths[row] for row in others]):
        rows = [others[number] for number in numbers]
        hidden_MH = _hidden(decoder, [sequences[row] for row in rows])
        yield rows, hidden_MH, list(torch.arange(len(hidden_MH)).split_with_sizes([lengths[row] for row in rows]))


def _hidden(decoder: Decoder, sequences: Sequence[Tensor]) -> Tensor:
    """(M, H) hidden states of the real positions, row after row. Padding is on the right, where a causal model's
    earlier positions cannot see it, so no attention mask is needed."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens_NT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    is_real_NT = torch.arange(tokens_NT.shape[1]) < lengths[:, None]
    return decoder.hidden_states(tokens_NT)[is_real_NT]


def _chunk_size(decoder: Decoder) -> int:
    return max(1, _LOGITS_PER_CHUNK // decoder.vocab_size)


def _in_chunks(values: Tensor, size: int) -> list[Tensor]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _top_k_chunk(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, tokens = logits_MV.topk(k)
    return values - logits_MV.logsumexp(-1, keepdim=True), tokens


@dataclass(frozen=True)
class _Kept:
    """A chunk between forward and backward: head input (a leaf), head output, and exp(logits - max) with its sums."""

    hidden_MH: Tensor
    logits_MV: Tensor
    exponentials_MV: Tensor
    sums_M: Tensor


class _Head:
    """The head of one micro-batch, in chunks of positions, so that logits never exist for all positions at once.

    Positions that are trained come first, so that a chunk needs a backward pass as a whole or not at all.
    """

    def __init__(
        self,
        decoder: Decoder,
        hidden_MH: Tensor,
        places: Sequence[Tensor],
        batch: Sequence[Datum],
        trained: list[Tensor] | None,
    ):
        self._decoder = decoder
        self._hidden_MH = hidden_MH
        self._shapes = [datum.targets.shape for datum in batch]
        widths = [shape[1] if len(shape) == 2 else 1 for shape in self._shapes]
        self._targets_P = torch.cat([datum.targets.flatten() for datum in batch])
        pairs_a_position = torch.cat(
            [torch.full((shape[0],), width) for shape, width in zip(self._shapes, widths, strict=True)]
        )
        self._position_P = torch.cat(list(places)).repeat_interleave(pairs_a_position)
        is_trained_M = torch.zeros(len(hidden_MH), dtype=torch.bool)
        if trained is not None:
            is_trained_M[self._position_P[torch.cat([mask.flatten() for mask in trained])]] = True
        size = _chunk_size(decoder)
        self._trained_chunks = _in_chunks(is_trained_M.nonzero().flatten(), size)
        self._other_chunks = _in_chunks((~is_trained_M).nonzero().flatten(), size)
        self._kept: dict[int, _Kept] = {}

    def logprobs(self) -> list[Tensor]:
        """Of all targets, per datum in the shape of its targets."""
        logprobs_P = torch.empty(len(self._targets_P))
        budget = _LOGITS_KEPT
        for number, positions in enumerate(self._trained_chunks):
            kept = self._forward_chunk(positions, logprobs_P)
            budget -= kept.logits_MV.numel()
            if budget >= 0:
                self._kept[number] = kept
        with torch.no_grad():
            for positions in self._other_chunks:
                self._forward_chunk(positions, logprobs_P)
        sizes = [math.prod(shape) for shape in self._shapes]
        return [
            values.reshape(shape)
            for values, shape in zip(logprobs_P.split_with_sizes(sizes), self._shapes, strict=True)
        ]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """From d loss / d logprob per datum to the gradients of head and decoder."""
        gradient_P = torch.cat([gradient.flatten() for gradient in gradients])
        if not self._trained_chunks:
            return
        hidden_gradient_MH = torch.zeros(self._hidden_MH.shape)
        for number, positions in enumerate(self._trained_chunks):
            kept = self._kept.pop(number, None) or self._forward_chunk(positions, None)
            torch.autograd.backward(kept.logits_MV, self._logits_gradient(kept, positions, gradient_P))
            assert kept.hidden_MH.grad is not None
            hidden_gradient_MH[positions] = kept.hidden_MH.grad
        if self._hidden_MH.requires_grad:
            torch.autograd.backward(self._hidden_MH, hidden_gradient_MH.to(self._hidden_MH.dtype))

    def _forward_chunk(self, positions: Tensor, logprobs_P: Tensor | None) -> _Kept:
        hidden_MH = self._hidden_MH.detach()[positions].float().requires_grad_(torch.is_grad_enabled())
        logits_MV = self._decoder.logits(hidden_MH)
        # In place: a linear layer does not need its output for its backward pass.
        values_MV = logits_MV.detach()
        max_M = values_MV.amax(-1)
        pairs, row_P = self._pairs(positions)
        target_logits_P = values_MV[row_P, self._targets_P[pairs]]
        exponentials_MV = values_MV.sub_(max_M[:, None]).exp_()
        sums_M = exponentials_MV.sum(-1)
        if logprobs_P is not None:
            logprobs_P[pairs] = target_logits_P - (max_M + sums_M.log())[row_P]
        return _Kept(hidden_MH, logits_MV, exponentials_MV, sums_M)

    def _logits_gradient(self, kept: _Kept, positions: Tensor, gradient_P: Tensor) -> Tensor:
        """sum over targets k of g_k (onehot_k - softmax), (M, V); overwrites the exponentials."""
        pairs, row_P = self._pairs(positions)
        chunk_gradient_P = gradient_P[pairs]
        total_M = torch.zeros(len(positions)).index_add_(0, row_P, chunk_gradient_P)
        gradient_MV = kept.exponentials_MV.mul_((-total_M / kept.sums_M)[:, None])
        return gradient_MV.index_put_((row_P, self._targets_P[pairs]), chunk_gradient_P, accumulate=True)

    def _pairs(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the pairs at these positions, and for each the row of its position in the chunk."""
        row_M = torch.full((len(self._hidden_MH),), -1)
        row_M[positions] = torch.arange(len(positions))
        row_P = row_M[self._position_P]
        pairs = (row_P >= 0).nonzero().flatten()
        return pairs, row_P[pairs]
