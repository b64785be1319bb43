"""Self-test of a deployment: do sampler and trainer give the same tokens of the same weights the same probability?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cookbook.data.rollout_datums import completion_logprobs, forward_datums
from cookbook.deadlines import Deadline
from cookbook.errors import LogprobMismatch, SamplingError
from cookbook.rollouts.ledger import sampling_seed
from cookbook.rollouts.records import Completion, PromptGroup
from cookbook.rollouts.sampler import Policy, Sampled
from cookbook.rollouts.turns import PromptRow, all_of

if TYPE_CHECKING:
    from cookbook.client import ReconnectableClient

__all__ = ["LogprobAgreement", "agreement", "check_logprobs"]

_RATIO_LOW, _RATIO_HIGH = 0.9, 1.1


@dataclass(frozen=True)
class LogprobAgreement:
    """How far the logprobs of sampler and trainer lie apart, over all sampled tokens."""

    num_tokens: int
    p50: float
    """Nats: median of |trainer - sampler|."""
    p99: float
    """Nats: 1% of the tokens differ by more, rounded up: of few tokens, the worst."""
    max: float
    """Nats."""
    outside: float
    """Share of the tokens whose probability ratio trainer / sampler is outside [0.9, 1.1]."""

    def metrics(self) -> dict[str, float]:
        """`logprob_check/...`, for the tracker."""
        values = {"p50": self.p50, "p99": self.p99, "max": self.max, "ratio_outside": self.outside}
        return {f"logprob_check/{name}": value for name, value in values.items()}


def agreement(sampler_logprobs: Sequence[float], trainer_logprobs: Sequence[float]) -> LogprobAgreement:
    """Compare two logprobs, in nats, of each of the same tokens. A pair that is not finite is infinitely apart."""
    sampler, trainer = np.asarray(sampler_logprobs, np.float64), np.asarray(trainer_logprobs, np.float64)
    with np.errstate(invalid="ignore"):
        delta = trainer - sampler
    delta[~np.isfinite(delta)] = np.inf
    apart = np.abs(delta)
    p50, p99 = np.quantile(apart, [0.5, 0.99], method="higher")
    inside = (delta >= np.log(_RATIO_LOW)) & (delta <= np.log(_RATIO_HIGH))
    return LogprobAgreement(len(apart), float(p50), float(p99), float(apart.max()), float(1.0 - inside.mean()))


def check_logprobs(
    policy: Policy,
    client: ReconnectableClient,
    rows: Sequence[PromptRow],
    *,
    version: str,
    limit: float,
    max_tokens: int = 64,
    completions: int = 2,
    seed: int = 0,
    timeout_s: float | None = None,
) -> LogprobAgreement:
    """Sample a few completions, and compare their logprobs with those of a forward pass of the trainer.

    Args:
        policy: samples a deployment that serves the trainer's present weights.
        client: of the trainer.
        rows: a few rows of the data; each is completed `completions` times, at temperature 1.
        version: the snapshot that was synced.
        limit: nats, `logprob_check_limit`.
        timeout_s: seconds for all of it; None = what each request may take.

    Raises:
        LogprobMismatch: 1% of the tokens differ by more than `limit`. Another version is served, the precision or a
            kernel differs, or the tokenizer is another one.
        SamplingError: no completion could be had, or another version served one.
        TrainerLost, RequestRejected: see the client.
    """
    jobs = [(row, number) for row in rows for number in range(completions)]

    async def sample() -> list[Sampled]:
        requests = [
            policy.complete(
                row.prompt_tokens,
                max_tokens=max_tokens,
                temperature=1.0,
                seed=sampling_seed(seed, row.index, number),
                version=version,
                cache_key=f"check-{row.index}",
                where=f"the logprob check of row {row.index} of the data",
            )
            for row, number in jobs
        ]
        return await all_of(requests)

    deadline = None if timeout_s is None else Deadline(timeout_s)
    answers = policy.run(sample(), timeout_s)
    others = sorted({answer.version for answer in answers} - {version})
    if others:
        raise SamplingError(f"the deployment serves {', '.join(map(repr, others))}, but {version!r} is synced.")
    groups = [_as_group(row, answer) for (row, _), answer in zip(jobs, answers, strict=True) if answer.tokens]
    if not groups:
        raise SamplingError(f"all {len(answers)} completions of the logprob check are empty.")
    left_s = None if deadline is None else deadline.for_call()
    output = client.forward(forward_datums(groups), "cross_entropy", timeout_s=left_s)
    logprobs = [result["logprobs"].to_torch() for result in output.loss_fn_outputs]
    trainer = [value for values in completion_logprobs(groups, logprobs) for value in values]
    sampler = [value for group in groups for value in group.completions[0].rollout_logprobs]
    found = agreement(sampler, trainer)
    if found.p99 > limit:
        raise LogprobMismatch(
            f"sampler and trainer differ by more than {found.p99:.3g} nats in 1% of {found.num_tokens} tokens (median "
            f"{found.p50:.3g}, largest {found.max:.3g}, {found.outside:.1%} of the ratios outside [0.9, 1.1]), more "
            f"than logprob_check_limit={limit:g}. Check that the deployment serves snapshot {version!r} in the "
            "trainer's precision, with the same tokenizer."
        )
    return found


def _as_group(row: PromptRow, answer: Sampled) -> PromptGroup:
    """An unscored completion in a group of its own, as the datums want it."""
    completion = Completion(
        tokens=answer.tokens,
        is_sampled=(True,) * len(answer.tokens),
        rollout_logprobs=answer.rollout_logprobs,
        sampling_logprobs=answer.sampling_logprobs,
        text=answer.text,
        finish_reason=answer.finish_reason,
        version=answer.version,
        seed=0,
        reward=0.0,
    )
    return PromptGroup(row.index, row.index, tuple(row.prompt_tokens), (completion,))
