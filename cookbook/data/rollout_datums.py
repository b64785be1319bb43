"""Prompt groups as the SDK's datums, and logprobs on the wire back as those of a completion's tokens.

The alignment, once for all: the input is x_0 .. x_{N-2} and the target at position j is x_{j+1}. A completion of T
tokens after a prompt of P has its targets at positions P-1 .. P+T-2, so that a completion of one token has exactly one
trained position, P-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from fireworks.training.sdk import Datum, ModelInput, TensorData
from numpy.typing import NDArray
from torch import Tensor

from cookbook.errors import DataError, SamplingError, ShapeError
from cookbook.losses.advantages import advantages
from cookbook.rollouts.records import Completion, PromptGroup

__all__ = [
    "TrainedCompletion",
    "completion_logprobs",
    "forward_datums",
    "num_skipped",
    "trained_completions",
    "with_advantages",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainedCompletion:
    """One completion with at least one sampled token, aligned with its prompt. Arrays are (T,), T its tokens."""

    number: int
    """Place among all completions of the step, group after group; the skipped ones count too."""
    where: str
    """For messages: row and completion."""
    num_prompt_tokens: int
    tokens: NDArray[np.int64]
    """(P + T,), prompt and completion."""
    is_trained: NDArray[np.bool_]
    """False for injected tokens."""
    rollout_logprobs: Floats
    """Nats, at temperature 1; 0 for injected tokens."""
    sampling_logprobs: Floats
    """Nats, of the distribution that was drawn from; 0 for injected tokens."""
    advantage: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion, T."""
        return len(self.is_trained)

    @property
    def targets(self) -> slice:
        """The completion's target positions, P-1 .. P+T-2."""
        start = self.num_prompt_tokens - 1
        return slice(start, start + self.num_tokens)

    def datum(self, inputs: Mapping[str, NDArray[np.generic]]) -> Datum:
        """The sequence on the wire, with per-token loss inputs (T,) in their place and 0 before it, as float32.

        Raises:
            ShapeError: a number is not finite in float32.
        """
        targets: dict[str, TensorData] = {"target_tokens": TensorData.from_numpy(self.tokens[1:])}
        for name, values in inputs.items():
            placed = np.zeros(len(self.tokens) - 1, np.float32)
            with np.errstate(over="ignore"):
                placed[self.targets] = values
            if not np.isfinite(placed).all():
                raise ShapeError(f"{self.where} has {name} beyond the range of float32. Check its rewards.")
            targets[name] = TensorData.from_numpy(placed)
        return Datum(model_input=ModelInput.from_ints(self.tokens[:-1].tolist()), loss_fn_inputs=targets)

    def mask_datum(self) -> Datum:
        """The sequence with weight 1 on its trained tokens: for a forward pass, or a loss on the client."""
        return self.datum({"weights": self.is_trained})

    def slice_of(self, logprobs: Tensor) -> Tensor:
        """The completion's logprobs, (T,), out of those of all targets, (P+T-1,). The gradient flows through.

        Raises:
            ShapeError: there is not one for each target.
        """
        if logprobs.shape != (len(self.tokens) - 1,):
            raise ShapeError(
                f"{self.where} has {len(self.tokens) - 1} target tokens and logprobs of shape {tuple(logprobs.shape)}. "
                "There must be one for each target token."
            )
        return logprobs[self.targets]


def with_advantages(group: PromptGroup, mode: str) -> PromptGroup:
    """The group with the advantage of each completion set from its rewards; `mode` as in RLConfig.advantage.

    Raises:
        ShapeError: fewer than 2 completions, or a reward that is not finite.
    """
    values = advantages(group.rewards, mode)
    pairs = zip(group.completions, values, strict=True)
    return replace(group, completions=tuple(replace(completion, advantage=value) for completion, value in pairs))


def trained_completions(groups: Sequence[PromptGroup]) -> list[TrainedCompletion]:
    """All completions of a step that have a sampled token, in order. The others (all injected) are left out.

    Raises:
        DataError: there is none; a group has no prompt; or its rewards differ and no advantage was set.
        SamplingError: a sampled token has no logprob. The message names the row.
    """
    trained: list[TrainedCompletion] = []
    number = 0
    for group in groups:
        _check_group(group)
        for place, completion in enumerate(group.completions):
            if completion.num_sampled > 0:
                trained.append(_trained(group, completion, place, number))
            number += 1
    if not trained:
        raise DataError(
            f"none of the {number} completions of the step has a sampled token (rows "
            f"{[group.row for group in groups]}): there is nothing to train."
        )
    return trained


def num_skipped(groups: Sequence[PromptGroup]) -> int:
    """Completions without a sampled token, which are not trained."""
    return sum(completion.num_sampled == 0 for group in groups for completion in group.completions)


def forward_datums(groups: Sequence[PromptGroup]) -> list[Datum]:
    """One datum for each completion that is trained, in order, for a forward pass of policy or reference."""
    return [completion.mask_datum() for completion in trained_completions(groups)]


def completion_logprobs(groups: Sequence[PromptGroup], logprobs: Sequence[Tensor]) -> list[list[float]]:
    """What a model answered to `forward_datums(groups)`, as one list a completion of one logprob a token.

    Completions that are not trained get zeros, so that the lists align with the completions of the groups. This is what
    `policy_step` takes as `reference_logprobs`.

    Raises:
        ShapeError: not one tensor for each datum, or not one number for each of its targets.
    """
    trained = trained_completions(groups)
    if len(trained) != len(logprobs):
        raise ShapeError(f"there are {len(trained)} datums and {len(logprobs)} answers to them.")
    lists = [[0.0] * len(completion.tokens) for group in groups for completion in group.completions]
    for completion, values in zip(trained, logprobs, strict=True):
        lists[completion.number] = completion.slice_of(values).tolist()
    return lists


def _check_group(group: PromptGroup) -> None:
    if not group.prompt_tokens:
        raise DataError(f"row {group.row} has an empty prompt: nothing predicts the first token of its completions.")
    values = [completion.advantage for completion in group.completions]
    if len(set(group.rewards)) > 1 and not any(values):
        raise DataError(
            f"the completions of row {group.row} have rewards {list(group.rewards)} and no advantages. "
            "Call with_advantages first."
        )
    if not np.isfinite(values).all():
        raise DataError(f"row {group.row} has advantages that are not finite: {values}.")


def _trained(group: PromptGroup, completion: Completion, place: int, number: int) -> TrainedCompletion:
    where = f"completion {place} of row {group.row}"
    is_trained = np.asarray(completion.is_sampled, dtype=bool)
    return TrainedCompletion(
        number=number,
        where=where,
        num_prompt_tokens=len(group.prompt_tokens),
        tokens=np.asarray((*group.prompt_tokens, *completion.tokens), dtype=np.int64),
        is_trained=is_trained,
        rollout_logprobs=_logprobs(completion.rollout_logprobs, is_trained, f"{where}: rollout_logprobs"),
        sampling_logprobs=_logprobs(completion.sampling_logprobs, is_trained, f"{where}: sampling_logprobs"),
        advantage=completion.advantage,
    )


def _logprobs(values: Sequence[float | None], is_trained: NDArray[np.bool_], where: str) -> Floats:
    """As an array, 0 where injected. A deployment that gives no logprob for a token gives None or NaN."""
    array = np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
    is_missing = is_trained & ~np.isfinite(array)
    if is_missing.any():
        place = int(np.flatnonzero(is_missing)[0])
        raise SamplingError(
            f"{where}[{place}] is {values[place]}: {int(is_missing.sum())} of {int(is_trained.sum())} sampled tokens "
            "lack their logprob, and each needs one. Check that the deployment returns logprobs."
        )
    return np.where(is_trained, array, 0.0)
