"""Evaluation on held-out pairs of answers, with the trainer's forward pass. Nothing is trained or sampled here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cookbook.data.pair_datums import pair_datums, response_logprobs
from cookbook.data.pairs import RenderedPair
from cookbook.deadlines import Deadline
from cookbook.errors import DataError, RequestRejected, ShapeError, TrainerLost
from cookbook.losses.preference import PairReference, PreferenceObjective, preferred

if TYPE_CHECKING:
    from cookbook.client import ReconnectableClient

__all__ = ["PreferenceEvalResult", "evaluate_preferences"]

References = Callable[[Sequence[RenderedPair], float | None], Sequence[PairReference]]
"""Reference logprobs of pairs, one each, in their order; within so many seconds (None = its own limit)."""


@dataclass(frozen=True)
class PreferenceEvalResult:
    """Means over held-out pairs. In an accuracy a tie counts half."""

    loss: float
    """The objective, in nats."""
    preference_accuracy: float
    """Share of pairs whose chosen answer is the more probable one as a whole: longer answers are less probable."""
    preference_accuracy_per_token: float
    """The same by the mean log-probability of a token."""
    chosen_logprob: float
    """Nats a token, mean over pairs of the mean over the response."""
    rejected_logprob: float
    num_pairs: int
    reward_accuracy: float | None = None
    """Share of pairs whose chosen answer gained more against the reference. None without a reference."""
    margin: float | None = None
    """How much more it gained, in nats, without beta. None without a reference."""

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, those that are None left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def evaluate_preferences(
    client: ReconnectableClient,
    pairs: Iterable[RenderedPair],
    objective: PreferenceObjective,
    references: References | None,
    *,
    is_reference: bool = False,
    chunk: int = 32,
    timeout_s: float | None = None,
) -> PreferenceEvalResult:
    """Evaluate the client's model on pairs.

    Args:
        pairs: read once and lazily.
        objective: as `objective_of` makes it from a config.
        references: asked for one chunk at a time; not asked by an objective without a reference.
        is_reference: the client's model is the reference, as a policy is before training: its own logprobs are taken
            for both, so that the margin is 0 exactly, and `references` is not asked.
        chunk: pairs in one request, each of two sequences.
        timeout_s: seconds for all pairs; None = the client's default for each request.

    Raises:
        DataError: there are no pairs.
        ShapeError: the objective needs references and there are none.
        RequestRejected: an answer is too long for the trainer, for one; or a logprob is not finite.
        TrainerLost: the trainer is gone, or the deadline has passed.
    """
    if objective.needs_reference and references is None and not is_reference:
        raise ShapeError(f"{objective.name} needs reference logprobs, and there are none.")
    deadline = None if timeout_s is None else Deadline(timeout_s)
    remaining = iter(pairs)
    sums: Counter[str] = Counter()
    num_pairs = 0
    while batch := list(itertools.islice(remaining, chunk)):
        _check_deadline(deadline, timeout_s, num_pairs)
        output = client.forward(
            pair_datums(batch), "cross_entropy", timeout_s=None if deadline is None else deadline.for_call()
        )
        logprobs = [row["logprobs"].to_torch().double() for row in output.loss_fn_outputs]
        responses = response_logprobs(batch, logprobs)
        for pair, response in zip(batch, responses, strict=True):
            _check_finite(pair, response)
        found: Sequence[PairReference | None] = [None] * len(batch)
        if objective.needs_reference and is_reference:
            found = [PairReference(*(math.fsum(side.tolist()) for side in response)) for response in responses]
        elif objective.needs_reference and references is not None:
            found = references(batch, None if deadline is None else deadline.for_call())
        for response, reference in zip(responses, found, strict=True):
            sums.update(_score(objective, *response, reference))  # floats as well as counts
        num_pairs += len(batch)
    if num_pairs == 0:
        raise DataError("there are no held-out pairs. Look at evaluation.dataset.")
    means = {name: value / num_pairs for name, value in sums.items()}
    return PreferenceEvalResult(num_pairs=num_pairs, **means)


def _check_deadline(deadline: Deadline | None, timeout_s: float | None, num_pairs: int) -> None:
    if deadline is not None and deadline.expired:
        raise TrainerLost(
            f"evaluation had finished {num_pairs} pairs when its {timeout_s:g} s were over. "
            "Raise evaluation.timeout_s, or lower evaluation.max_pairs."
        )


def _check_finite(pair: RenderedPair, response: tuple[Tensor, Tensor]) -> None:
    for side, logprobs in zip(("chosen", "rejected"), response, strict=True):
        if not bool(logprobs.isfinite().all()):
            raise RequestRejected(
                f"the {side} answer of the held-out pair {pair.digest} has logprobs that sum to "
                f"{float(logprobs.sum())}. Lower the learning rate, or load an earlier checkpoint."
            )


def _score(
    objective: PreferenceObjective, chosen: Tensor, rejected: Tensor, reference: PairReference | None
) -> dict[str, float]:
    """One pair, by the names of `PreferenceEvalResult`."""
    pair = objective.evaluate(chosen, rejected, reference)
    mean_chosen, mean_rejected = float(chosen.mean()), float(rejected.mean())
    scores = {
        "loss": pair.loss,
        "preference_accuracy": preferred(float(chosen.sum() - rejected.sum())),
        "preference_accuracy_per_token": preferred(mean_chosen - mean_rejected),
        "chosen_logprob": mean_chosen,
        "rejected_logprob": mean_rejected,
    }
    if reference is not None:
        scores["reward_accuracy"] = pair.metrics["preference/accuracy"]
        scores["margin"] = pair.metrics["preference/margin"]
    return scores
