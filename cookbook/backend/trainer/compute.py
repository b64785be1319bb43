"""One forward or forward-backward over a request's datums: micro-batches, a chunked head, gradients into `.grad`.

Suffixes: N rows of a micro-batch, T padded positions, M positions computed (no padding, and a shared prefix once), P
(position, target) pairs, H hidden, V vocabulary. Which weights are trained and what becomes of the gradients is not
decided here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cookbook.backend.branches import Forest
from cookbook.backend.decoder import Decoder
from cookbook.backend.trainer.head import Head, chunk_size, in_chunks
from cookbook.backend.trainer.prefix import PrefixGroup, prefix_groups, shared_batches
from cookbook.errors import RequestRejected
from cookbook.losses import Kernel, LossConfig, LossInput

__all__ = [
    "BatchResult",
    "Datum",
    "KeptForward",
    "TopK",
    "forward",
    "forward_backward",
    "forward_kept",
    "micro_batches",
    "top_k",
]

TOKENS_PER_MICRO_BATCH = 2048
"""Padded tokens that pass through the decoder together; a longer datum passes alone."""

_POSITIONS_KEPT = 2 * TOKENS_PER_MICRO_BATCH  # in `KeptForward`: what a custom loss may hold while the client computes


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


class KeptForward:
    """The first micro-batches of a forward pass with their graphs, for one `forward_backward` on the same sequences."""

    def __init__(self, data: Sequence[Datum]) -> None:
        self._data = list(data)
        self._passes: list[_Pass] = []
        self._room = _POSITIONS_KEPT
        self._is_full = False

    def fits(self, data: Sequence[Datum]) -> bool:
        """Whether these are the tokens and targets that passed; the loss may be another."""
        return len(data) == len(self._data) and all(
            torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)
            for one, other in zip(data, self._data, strict=True)
        )

    def has_room(self, batch: _MicroBatch) -> bool:
        """The first micro-batch always has: its backward pass would need the same memory. After one that has none, no
        other has: only the first ones are kept."""
        self._is_full = self._is_full or (bool(self._passes) and batch.num_positions > self._room)
        return not self._is_full

    def add(self, passed: _Pass) -> None:
        """Take a micro-batch that passed with its graph. They come in the order of the request."""
        self._passes.append(passed)
        self._room -= passed.batch.num_positions

    def take(self, batch: _MicroBatch) -> _Pass | None:
        """This micro-batch, no longer held here; None = it was not kept. Asked for in the order of the request."""
        return self._passes.pop(0) if self._passes and self._passes[0].batch == batch else None


def forward(decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig) -> BatchResult:
    """Logprobs of all targets, and the loss as a metric. No gradients."""
    with torch.no_grad(), decoder.fixed_weights():
        return _run(decoder, data, kernel, config, None, None)


def forward_kept(
    decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig
) -> tuple[BatchResult, KeptForward]:
    """The bits of `forward`, and what `forward_backward` need not compute again while no weight has changed."""
    kept = KeptForward(data)
    with decoder.fixed_weights():
        return _run(decoder, data, kernel, config, None, kept), kept


def forward_backward(
    decoder: Decoder, data: Sequence[Datum], kernel: Kernel, config: LossConfig, kept: KeptForward | None = None
) -> BatchResult:
    """As `forward`, and adds the gradient of the raw loss sum to the `.grad` of the parameters that require it.

    Args:
        kept: of a forward pass that `fits` the data, on the same weights; it is used up. The bits are those without it.

    Raises:
        RequestRejected: a logprob, the loss or its gradient is not finite. `.grad` may hold a part of the gradient
            after any exception: the caller throws it away.
    """
    with decoder.fixed_weights():
        return _run(decoder, data, kernel, config, kept or KeptForward(()), None)


def top_k(decoder: Decoder, data: Sequence[Datum], k: int) -> TopK:
    """The k most probable next tokens at every position."""
    logprobs: list[Tensor] = [torch.empty(0)] * len(data)
    indices: list[Tensor] = [torch.empty(0)] * len(data)
    with torch.no_grad():
        for rows in micro_batches([len(datum.tokens) for datum in data]):
            hidden_MH = _hidden(decoder, [data[row].tokens for row in rows])
            parts = [_top_k_chunk(decoder.logits(chunk), k) for chunk in in_chunks(hidden_MH, chunk_size(decoder))]
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


def _run(
    decoder: Decoder,
    data: Sequence[Datum],
    kernel: Kernel,
    config: LossConfig,
    before: KeptForward | None,
    after: KeptForward | None,
) -> BatchResult:
    """Forward, and backward where there is a `before`. With `after` graphs are put there."""
    logprobs: list[Tensor] = [torch.empty(0)] * len(data)
    metrics = {"loss:sum": 0.0}
    num_loss_tokens = num_sequences = 0
    loss_tokens = [_loss_tokens(kernel, datum) for datum in data]
    for batch in _plan(decoder, [datum.tokens for datum in data]):
        trained = [loss_tokens[row] for row in batch.rows]
        passed = before.take(batch) if before is not None else None
        if passed is None or not passed.head.is_for(trained):
            hidden_MH = None if passed is None else passed.head.hidden_MH
            keeps = before is not None or (after is not None and after.has_room(batch))
            passed = _pass(decoder, batch, data, trained, hidden_MH, keeps)
            if after is not None and keeps:
                after.add(passed)
        gradients = []
        for row, values in zip(batch.rows, passed.logprobs, strict=True):
            gradient, row_metrics = _evaluate(kernel, config, data[row], values, row)
            gradients.append(gradient)
            logprobs[row] = values
            for key, value in row_metrics.items():
                metrics[key] = metrics.get(key, 0.0) + value
        if before is not None:
            passed.head.backward(gradients)
        num_loss_tokens += sum(int(mask.sum()) for mask in trained)
        num_sequences += sum(bool(mask.any()) for mask in trained)
    metrics |= {"num_loss_tokens:sum": float(num_loss_tokens), "num_sequences:sum": float(num_sequences)}
    return BatchResult(logprobs, metrics, num_loss_tokens, num_sequences)


def _pass(
    decoder: Decoder,
    batch: _MicroBatch,
    data: Sequence[Datum],
    trained: list[Tensor],
    hidden_MH: Tensor | None,
    keeps: bool,
) -> _Pass:
    """One micro-batch through decoder and head, or through the head alone where its hidden states are known."""
    with torch.set_grad_enabled(keeps):
        if hidden_MH is None:
            hidden_MH = batch.hidden(decoder, [datum.tokens for datum in data])
        head = Head(decoder, hidden_MH, batch.places(), [data[row].targets for row in batch.rows], trained)
        return _Pass(batch, head, head.logprobs(keeps))


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


@dataclass(frozen=True)
class _MicroBatch:
    """Rows of a request that pass together. lengths: of all rows of the request, in tokens."""

    rows: Sequence[int]
    lengths: Sequence[int]
    groups: Sequence[PrefixGroup] = ()
    """Which of the rows begin alike: none of them or, in the order of `rows`, all of them."""

    @property
    def num_positions(self) -> int:
        return sum(self.lengths[row] for row in self.rows) - sum(group.saved for group in self.groups)

    @functools.cached_property
    def forest(self) -> Forest:
        return Forest([group.tree(self.lengths) for group in self.groups])

    def places(self) -> list[Tensor]:
        """For each row the indices into M of its positions."""
        if self.groups:
            return self.forest.sequences()
        return list(torch.arange(self.num_positions).split_with_sizes([self.lengths[row] for row in self.rows]))

    def hidden(self, decoder: Decoder, sequences: Sequence[Tensor]) -> Tensor:
        """(M, H) hidden states; rows that begin alike share those of what they begin with."""
        if not self.groups:
            return _hidden(decoder, [sequences[row] for row in self.rows])
        tokens_M = torch.cat([group.tokens(sequences) for group in self.groups])
        return decoder.forest_hidden_states(tokens_M, self.forest)


@dataclass(frozen=True)
class _Pass:
    """A micro-batch after its forward pass. logprobs: per row, float32, in the shape of its targets."""

    batch: _MicroBatch
    head: Head
    logprobs: list[Tensor]


def _plan(decoder: Decoder, sequences: Sequence[Tensor]) -> list[_MicroBatch]:
    """Every row in one micro-batch; rows that begin alike, as the completions of one prompt do, together and first."""
    lengths = [len(tokens) for tokens in sequences]
    groups = prefix_groups(sequences) if decoder.shares_prefixes else []
    batches = []
    for batch in shared_batches(groups, lengths, TOKENS_PER_MICRO_BATCH):
        rows = [row for group in batch for row in group.rows]
        batches.append(_MicroBatch(rows, lengths, batch))
    shared = {row for group in groups for row in group.rows}
    others = [row for row in range(len(sequences)) if row not in shared]
    for numbers in micro_batches([lengths[row] for row in others]):
        batches.append(_MicroBatch([others[number] for number in numbers], lengths))
    return batches


def _hidden(decoder: Decoder, sequences: Sequence[Tensor]) -> Tensor:
    """(M, H) hidden states of the real positions, row after row. Padding is on the right, where a causal model's
    earlier positions cannot see it, so no attention mask is needed."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens_NT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    is_real_NT = torch.arange(tokens_NT.shape[1]) < lengths[:, None]
    return decoder.hidden_states(tokens_NT)[is_real_NT]


def _top_k_chunk(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, tokens = logits_MV.topk(k)
    return values - logits_MV.logsumexp(-1, keepdim=True), tokens
