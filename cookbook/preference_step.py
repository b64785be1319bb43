"""One optimizer step on pairs of answers: the objective here, its gradient through forward_backward_custom.

The formulas are in cookbook/losses/preference.py, the alignment of tokens in cookbook/data/pair_datums.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cookbook.data.pair_datums import pair_datums, response_logprobs
from cookbook.data.pairs import RenderedPair
from cookbook.deadlines import Deadline
from cookbook.errors import DataError, RequestRejected, ShapeError
from cookbook.losses.preference import PairLoss, PairReference, PreferenceObjective

if TYPE_CHECKING:
    from fireworks.training.sdk import AdamParams, Datum

    from cookbook.client import ReconnectableClient

__all__ = ["PreferenceStepResult", "mean_metrics", "pair_losses", "preference_step"]


@dataclass(frozen=True)
class PreferenceStepResult:
    """One optimizer step."""

    loss: float
    """The objective before the update, in nats, mean over pairs, whoever normalizes the gradient."""
    metrics: dict[str, float]
    """By "group/name"; listed at `preference_step`."""
    num_tokens: int
    """Of both answers of all pairs, the prompt counted with each."""
    num_trained: int
    """Response tokens, of both answers of all pairs."""
    num_pairs: int
    seconds: float
    """From the first request to the last answer."""


def preference_step(
    client: ReconnectableClient,
    pairs: Sequence[RenderedPair],
    objective: PreferenceObjective,
    adam: AdamParams,
    *,
    references: Sequence[PairReference] | None,
    grad_accumulation_normalization: str | None,
    timeout_s: float,
) -> PreferenceStepResult:
    """One forward_backward_custom over all pairs of the step, and one optim_step.

    Args:
        client: of the policy's trainer.
        pairs: what one step trains.
        objective: as `objective_of` makes it from a config.
        adam: of this step.
        references: one a pair, in their order; not looked at by an objective without a reference.
        grad_accumulation_normalization: None or "none": the gradient is that of the mean over pairs. Otherwise it goes
            out as the raw sum over pairs and the trainer divides it: "num_sequences" by the answers, two a pair (half
            of the mean), "num_loss_tokens" by the response tokens with a gradient.
        timeout_s: for the whole step.

    Returns:
        Metrics, each the mean over pairs of what the objective tells of a pair: preference/margin, accuracy,
        chosen_reward, rejected_reward, chosen_logprob, rejected_logprob (nats a token), chosen_tokens, rejected_tokens;
        orpo/nll and orpo/odds_ratio_loss for ORPO; and train/grad_norm if reported.

    Raises:
        DataError, ShapeError: pairs or references cannot be trained on. Nothing was sent.
        RequestRejected: the trainer refused, or a logprob, loss or gradient is not finite. The weights are unchanged.
        TrainerLost: see `ReconnectableClient`.
    """
    if not pairs:
        raise DataError("there are no pairs to train on.")
    datums = pair_datums(pairs)
    checked = _references(pairs, objective, references)
    is_mean = grad_accumulation_normalization in (None, "none")
    deadline = Deadline(timeout_s)
    started = time.monotonic()
    evaluated: list[PairLoss] = []

    def loss(datums: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        responses = response_logprobs(pairs, logprobs)
        evaluated[:] = pair_losses(objective, responses, checked)
        gradients = _outgoing(evaluated, len(pairs) if is_mean else 1)
        _check_finite(pairs, responses, evaluated, gradients)
        # Linear in the logprobs, with the gradient of the objective: the SDK's backward pass hands on just that.
        sides = [side for response in responses for side in response]
        terms = [(side * gradient).sum() for side, gradient in zip(sides, gradients, strict=True)]
        return torch.stack(terms).sum(), {}

    client.forward_backward_custom(datums, loss, timeout_s=deadline.for_call())
    answer = client.optim_step(
        adam, grad_accumulation_normalization=grad_accumulation_normalization, timeout_s=deadline.for_call()
    )
    seconds = time.monotonic() - started
    metrics = mean_metrics(evaluated)
    if "grad_norm" in (answer.metrics or {}):
        metrics["train/grad_norm"] = float(answer.metrics["grad_norm"])
    return PreferenceStepResult(
        loss=sum(pair.loss for pair in evaluated) / len(pairs),
        metrics=metrics,
        num_tokens=sum(pair.num_tokens for pair in pairs),
        num_trained=sum(pair.num_trained for pair in pairs),
        num_pairs=len(pairs),
        seconds=seconds,
    )


def pair_losses(
    objective: PreferenceObjective,
    responses: Sequence[tuple[Tensor, Tensor]],
    references: Sequence[PairReference | None],
) -> list[PairLoss]:
    """The objective at the logprobs of each pair's response tokens, (n_c,) and (n_d,)."""
    return [
        objective.evaluate(chosen, rejected, reference)
        for (chosen, rejected), reference in zip(responses, references, strict=True)
    ]


def mean_metrics(losses: Sequence[PairLoss]) -> dict[str, float]:
    """The mean over pairs of each metric."""
    return {name: sum(pair.metrics[name] for pair in losses) / len(losses) for name in losses[0].metrics}


def _references(
    pairs: Sequence[RenderedPair], objective: PreferenceObjective, references: Sequence[PairReference] | None
) -> Sequence[PairReference | None]:
    """One a pair. All checks of them are here."""
    if not objective.needs_reference:
        return [None] * len(pairs)
    if references is None or len(references) != len(pairs):
        number = "no" if references is None else len(references)
        raise ShapeError(f"{objective.name} needs reference logprobs: {len(pairs)} pairs have {number} references.")
    for number, reference in enumerate(references):
        if not reference.is_finite:
            raise ShapeError(
                f"pair {number} (of {len(pairs)}) has reference logprobs {reference.chosen} and {reference.rejected}. "
                "They must be finite."
            )
    return references


def _outgoing(losses: Sequence[PairLoss], divisor: int) -> list[Tensor]:
    """d objective / d l of both sides of each pair, float32, as the trainer gets it."""
    sides = [side for pair in losses for side in (pair.chosen_gradient, pair.rejected_gradient)]
    return [(side / divisor).float() for side in sides]


def _check_finite(
    pairs: Sequence[RenderedPair],
    responses: Sequence[tuple[Tensor, Tensor]],
    losses: Sequence[PairLoss],
    gradients: Sequence[Tensor],
) -> None:
    for number, ((chosen, rejected), pair) in enumerate(zip(responses, losses, strict=True)):
        named = {
            "chosen logprob": chosen,
            "rejected logprob": rejected,
            "loss": torch.tensor(pair.loss, dtype=torch.float64),
            "gradient": torch.cat(list(gradients[2 * number : 2 * number + 2])),
        }
        for name, values in named.items():
            if not bool(values.isfinite().all()):
                wrong = float(values[~values.isfinite()][0])
                raise RequestRejected(
                    f"pair {number} (of {len(pairs)}, digest {pairs[number].digest}) has a {name} of {wrong}; nothing "
                    "was trained. Lower the learning rate, or load an earlier checkpoint."
                )
