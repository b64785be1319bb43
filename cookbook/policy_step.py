"""One optimizer step of the policy on prompt groups: the loss of an RLConfig, on the path that can evaluate it.

Built-in path: the trainer's kernel; forward_backward and optim_step go out together. Custom path: the same formula
here, by forward_backward_custom, for what no kernel has (the KL term). Both add the same gradient to the accumulated
one. The formulas are in cookbook/losses, the alignment of tokens in cookbook/data/rollout_datums.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cookbook.config import RLConfig
from cookbook.data.rollout_datums import TrainedCompletion, num_skipped, trained_completions
from cookbook.deadlines import Deadline
from cookbook.errors import RequestRejected, ShapeError, TrainerLost
from cookbook.losses.correction import gap_metrics
from cookbook.losses.policy_losses import (
    Anchor,
    CompletionTokens,
    PolicyLossOutput,
    PolicyObjective,
    Tis,
    policy_loss,
    token_advantages,
)
from cookbook.rollouts.records import PromptGroup

if TYPE_CHECKING:
    from fireworks.training.sdk import AdamParams, Datum, TensorData

    from cookbook.client import ReconnectableClient

__all__ = ["PolicyStepResult", "policy_objective", "policy_step"]


@dataclass(frozen=True)
class PolicyStepResult:
    """One optimizer step."""

    loss_sum: float
    """The objective summed over all trained tokens, in nats times advantage; not normalized."""
    metrics: dict[str, float]
    """By "group/name"; listed at `policy_step`."""
    num_tokens: int
    """Of all sequences that were trained on, prompts included."""
    num_loss_tokens: int
    """Tokens with a gradient: what the trainer divides by under grad_accumulation_normalization="num_loss_tokens"."""
    seconds: float
    """From the first request to the last answer."""


def policy_objective(config: RLConfig) -> PolicyObjective:
    """What `config` optimizes, and with which kernel of the trainer.

    | policy_loss         | kernel                                                                          |
    |---------------------|---------------------------------------------------------------------------------|
    | grpo                | ppo; eps_clip, eps_clip_high                                                    |
    | importance_sampling | importance_sampling                                                             |
    | dapo                | ppo, or dapo when eps_clip_c is set                                             |
    | gspo, cispo, dro    | of the same name                                                                |
    | reinforce           | importance_sampling with the ratio to the distribution that was drawn from; no TIS |

    Clip bounds on the wire are bounds of the ratio, 1 - eps and 1 + eps.
    """
    kernel, kernel_config = _kernel(config)
    is_reinforce = config.policy_loss == "reinforce"
    return PolicyObjective(
        name=config.policy_loss,
        kernel=kernel,
        kernel_config=kernel_config,
        anchor="sampling" if is_reinforce else _anchor(config),
        tis=None if is_reinforce else Tis(config.tis.cap, config.tis.level),
        kl_beta=config.active_kl_beta,
        kl_estimator=config.kl_estimator,
    )


def policy_step(
    client: ReconnectableClient,
    groups: Sequence[PromptGroup],
    config: RLConfig,
    adam: AdamParams,
    *,
    reference_logprobs: Sequence[Sequence[float]] | None = None,
    timeout_s: float | None = None,
) -> PolicyStepResult:
    """One forward_backward over all completions of the step, and one optim_step.

    The advantages must be set (`with_advantages`). Injected tokens are never trained or counted; a completion of
    injected tokens only is left out and counted in `train/skipped_completions`.

    With the anchor old_policy, o is the policy just before this update: one more forward pass on the built-in path, on
    the custom one that which it makes anyway. How far the policy has moved since the tokens were sampled is then
    corrected by TIS alone.

    Args:
        client: of the policy's trainer.
        groups: what one step trains, in row order.
        config: the objective and its normalization.
        adam: of this step.
        reference_logprobs: one list a completion (the skipped ones too) of one logprob a token, nats, as
            `completion_logprobs` makes them. Needed where config.active_kl_beta > 0; else only measured.
        timeout_s: for the whole step. None = config.step_timeout_s.

    Returns:
        Metrics, all of them over the trained tokens:
        sampler/logprob_gap_p50, _p99, _max, sampler/ratio_outside_share, sampler/k3: see `gap_metrics`.
        policy/logprob (mean, nats), policy/clip_share (of losses that clip), policy/builtin (1 or 0).
        tis/weight_mean, tis/truncated_share (not for reinforce).
        kl/mean (nats a token) and kl/loss_mean (kl_beta times it) where there is a reference.
        train/trained_tokens, train/loss_tokens, train/skipped_completions, and train/grad_norm if reported.

    Raises:
        DataError, SamplingError, ShapeError: groups or reference logprobs cannot be trained on. Nothing was sent.
        RequestRejected: the trainer refused, or logprobs, loss or gradient are not finite. The weights are unchanged.
        TrainerLost: see `ReconnectableClient`; also when the trainer reports logprobs that are not finite after a step.
    """
    completions = trained_completions(groups)
    step = _Step(policy_objective(config), completions, _references(groups, completions, reference_logprobs))
    deadline = Deadline(timeout_s or config.step_timeout_s)
    started = time.monotonic()
    if step.objective.is_builtin:
        values, reported = _builtin_step(client, step, config, adam, deadline)
    else:
        values, reported = _custom_step(client, step, config, adam, deadline)
    metrics = _metrics(step, values)
    metrics["train/skipped_completions"] = float(num_skipped(groups))
    num_loss_tokens = int(reported.get("num_loss_tokens", values.num_loss_tokens))
    metrics["train/loss_tokens"] = float(num_loss_tokens)
    if "grad_norm" in reported:
        metrics["train/grad_norm"] = float(reported["grad_norm"])
    num_tokens = sum(len(completion.tokens) for completion in completions)
    return PolicyStepResult(values.loss_sum, metrics, num_tokens, num_loss_tokens, time.monotonic() - started)


# -- the objective of a config -----------------------------------------------------------------------------------------


def _kernel(config: RLConfig) -> tuple[str, dict[str, float]]:
    cap = {"ratio_log_cap": config.ratio_log_cap}
    match config.policy_loss:
        case "grpo":
            high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
            return "ppo", _bounds(config.eps_clip, high) | cap
        case "dapo":
            dapo = config.dapo
            keys = _bounds(dapo.eps_clip, dapo.eps_clip_high) | {"ratio_log_cap": dapo.ratio_log_cap}
            return ("ppo", keys) if dapo.eps_clip_c is None else ("dapo", keys | {"eps_clip_c": dapo.eps_clip_c})
        case "gspo":
            gspo = config.gspo
            keys = _bounds(gspo.clip_ratio_low, gspo.clip_ratio_high)
            return "gspo", keys | {"seq_ratio_log_cap": gspo.seq_ratio_log_cap}
        case "cispo":
            cispo = config.cispo
            return "cispo", _bounds(cispo.eps_low, cispo.eps_high) | {"ratio_log_cap": cispo.ratio_log_cap}
        case "dro":
            return "dro", {"beta": config.dro.beta}
        case "importance_sampling" | "reinforce":
            return "importance_sampling", cap
        case other:
            raise ShapeError(f"policy_loss {other!r} has no formula.")


def _bounds(eps_low: float, eps_high: float) -> dict[str, float]:
    return {"clip_low_threshold": 1.0 - eps_low, "clip_high_threshold": 1.0 + eps_high}


def _anchor(config: RLConfig) -> Anchor:
    """auto: the rollout logprobs are those of the weights that are updated only where one update follows one sync."""
    is_rollout = config.anchor_logp == "rollout" or (
        config.anchor_logp == "auto" and config.weight_sync.weight_sync_interval == 1
    )
    return "rollout" if is_rollout else "old_policy"


# -- one step ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """What is trained, and for what."""

    objective: PolicyObjective
    completions: Sequence[TrainedCompletion]
    references: Sequence[Tensor | None]

    def anchors(self, policy: Sequence[Tensor] | None) -> list[Tensor]:
        """o of each completion, float64 (T,); `policy` is a forward pass, for the anchor old_policy."""
        if self.objective.anchor == "old_policy":
            assert policy is not None
            return [logprobs.detach() for logprobs in policy]
        is_rollout = self.objective.anchor == "rollout"
        return [torch.from_numpy(c.rollout_logprobs if is_rollout else c.sampling_logprobs) for c in self.completions]


@dataclass(frozen=True)
class _Values:
    """The objective at the policy's logprobs before the update, and d loss / d logprob a completion, (T,)."""

    policy: list[Tensor]
    outputs: list[PolicyLossOutput]
    gradients: list[Tensor]

    @property
    def loss_sum(self) -> float:
        return sum(float(output.loss.detach()) for output in self.outputs)

    @property
    def num_loss_tokens(self) -> int:
        return sum(int((gradient != 0).sum()) for gradient in self.gradients)


def _evaluate(step: _Step, policy: Sequence[Tensor], anchors: Sequence[Tensor]) -> _Values:
    """The objective in float64.

    Raises:
        RequestRejected: a logprob, a loss or a gradient is not finite.
    """
    leaves, outputs, gradients = [], [], []
    for completion, logprobs, old, reference in zip(step.completions, policy, anchors, step.references, strict=True):
        leaf = logprobs.detach().double().requires_grad_()
        tokens = CompletionTokens(
            policy_logprobs=leaf,
            old_logprobs=old,
            sampling_logprobs=torch.from_numpy(completion.sampling_logprobs),
            is_trained=torch.from_numpy(completion.is_trained),
            advantage=completion.advantage,
            reference_logprobs=reference,
        )
        output = policy_loss(step.objective, tokens)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        gradient = gradient.float()  # as it goes out
        _check_finite(completion, leaf.detach(), output.loss.detach(), gradient)
        leaves.append(leaf.detach())
        outputs.append(output)
        gradients.append(gradient)
    return _Values(leaves, outputs, gradients)


def _check_finite(completion: TrainedCompletion, policy: Tensor, loss: Tensor, gradient: Tensor) -> None:
    for name, values in (("policy logprob", policy), ("loss", loss), ("gradient", gradient)):
        if not bool(values.isfinite().all()):
            wrong = float(values[~values.isfinite()][0])
            raise RequestRejected(
                f"{completion.where} has a {name} of {wrong}. Its policy logprobs are from {float(policy.min())} to "
                f"{float(policy.max())} nats, its advantage is {completion.advantage}. Lower the learning rate, "
                "kl_beta or the advantages, or load an earlier checkpoint."
            )


def _builtin_step(
    client: ReconnectableClient, step: _Step, config: RLConfig, adam: AdamParams, deadline: Deadline
) -> tuple[_Values, Mapping[str, float]]:
    objective, completions = step.objective, step.completions
    before = None
    if objective.anchor == "old_policy":
        masks = [completion.mask_datum() for completion in completions]
        answer = client.forward(masks, "cross_entropy", timeout_s=deadline.for_call())
        before = _policy_logprobs(completions, answer.loss_fn_outputs)
    anchors = step.anchors(before)
    result = client.train_step(
        [_policy_datum(objective, *pair) for pair in zip(completions, anchors, strict=True)],
        objective.kernel,
        adam,
        grad_accumulation_normalization=config.grad_accumulation_normalization,
        loss_fn_config=objective.kernel_config,
        timeout_s=deadline.for_call(),
    )
    try:
        values = _evaluate(step, _policy_logprobs(completions, result.loss_fn_outputs), anchors)
    except RequestRejected as error:  # a trainer that does not refuse such a loss has stepped on it
        raise TrainerLost(f"the trainer stepped on values that are not finite: {error}") from None
    # A kernel counts where its advantages are not 0, clipped or not.
    return values, {"num_loss_tokens": _num_advantages(step, anchors), **result.metrics}


def _custom_step(
    client: ReconnectableClient, step: _Step, config: RLConfig, adam: AdamParams, deadline: Deadline
) -> tuple[_Values, Mapping[str, float]]:
    evaluated: list[_Values] = []

    def loss(datums: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        pairs = zip(step.completions, logprobs, strict=True)
        slices = [completion.slice_of(row) for completion, row in pairs]
        policy = [values.detach().double() for values in slices]
        values = _evaluate(step, policy, step.anchors(policy))
        evaluated.append(values)
        # Linear in the logprobs, with the gradient of the objective: the SDK's backward pass hands on just that.
        terms = [(row * gradient).sum() for row, gradient in zip(slices, values.gradients, strict=True)]
        return torch.stack(terms).sum(), {}

    masks = [completion.mask_datum() for completion in step.completions]
    client.forward_backward_custom(masks, loss, timeout_s=deadline.for_call())
    answer = client.optim_step(
        adam,
        grad_accumulation_normalization=config.grad_accumulation_normalization,
        timeout_s=deadline.for_call(),
    )
    return evaluated[-1], answer.metrics or {}


def _policy_datum(objective: PolicyObjective, completion: TrainedCompletion, old: Tensor) -> Datum:
    advantages = _advantages(objective, completion, old)
    is_trained = torch.from_numpy(completion.is_trained)
    old = torch.where(is_trained, old, 0.0)
    return completion.datum({"logprobs": old.numpy(), "advantages": advantages.numpy()})


def _advantages(objective: PolicyObjective, completion: TrainedCompletion, old: Tensor) -> Tensor:
    sampling, is_trained = torch.from_numpy(completion.sampling_logprobs), torch.from_numpy(completion.is_trained)
    return token_advantages(objective, old, sampling, is_trained, completion.advantage)[0]


def _num_advantages(step: _Step, anchors: Sequence[Tensor]) -> int:
    pairs = zip(step.completions, anchors, strict=True)
    return sum(int((_advantages(step.objective, *pair).float() != 0).sum()) for pair in pairs)


def _policy_logprobs(
    completions: Sequence[TrainedCompletion], outputs: Sequence[Mapping[str, TensorData]]
) -> list[Tensor]:
    """The completions' logprobs, float64 (T,), out of the trainer's answer."""
    if len(outputs) != len(completions):
        raise ShapeError(f"the trainer answered {len(outputs)} outputs to {len(completions)} datums.")
    pairs = zip(completions, outputs, strict=True)
    return [completion.slice_of(output["logprobs"].to_torch().double()) for completion, output in pairs]


def _references(
    groups: Sequence[PromptGroup],
    completions: Sequence[TrainedCompletion],
    reference_logprobs: Sequence[Sequence[float]] | None,
) -> list[Tensor | None]:
    """The reference's logprobs of each trained completion, float64 (T,). All checks of them are here."""
    if reference_logprobs is None:
        return [None] * len(completions)
    expected = sum(len(group.completions) for group in groups)
    if len(reference_logprobs) != expected:
        raise ShapeError(f"there are {expected} completions and {len(reference_logprobs)} lists of reference_logprobs.")
    references: list[Tensor | None] = []
    for completion in completions:
        values = torch.tensor(list(reference_logprobs[completion.number]), dtype=torch.float64)
        if len(values) != completion.num_tokens:
            raise ShapeError(
                f"{completion.where} has {completion.num_tokens} tokens and {len(values)} reference_logprobs."
            )
        if not bool(values[torch.from_numpy(completion.is_trained)].isfinite().all()):
            raise ShapeError(f"{completion.where} has reference_logprobs that are not finite.")
        references.append(values)
    return references


# -- metrics -----------------------------------------------------------------------------------------------------------


def _metrics(step: _Step, values: _Values) -> dict[str, float]:
    masks = [torch.from_numpy(completion.is_trained) for completion in step.completions]
    policy = torch.cat([logprobs[mask] for logprobs, mask in zip(values.policy, masks, strict=True)])
    rollout = torch.cat([torch.from_numpy(c.rollout_logprobs[c.is_trained]) for c in step.completions])
    num_trained = len(policy)
    sums: Counter[str] = Counter()
    for output in values.outputs:
        sums.update(output.sums)  # floats as well as counts
    metrics = gap_metrics(policy, rollout)
    metrics |= {
        "policy/logprob": float(policy.mean()),
        "policy/builtin": float(step.objective.is_builtin),
        "train/trained_tokens": float(num_trained),
    }
    names = {
        "clipped": "policy/clip_share",
        "tis_weight": "tis/weight_mean",
        "tis_truncated": "tis/truncated_share",
        "kl": "kl/mean",
    }
    metrics |= {name: sums[key] / num_trained for key, name in names.items() if key in sums}
    if "kl" in sums:
        metrics["kl/loss_mean"] = step.objective.kl_beta * metrics["kl/mean"]
    return metrics
