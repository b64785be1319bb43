"""Losses on pairs of answers, DPO and ORPO: value, closed-form gradient and metrics of one pair, in float64.

Notation of a pair: chosen answer c, rejected answer d (dispreferred), l = log-probability of a response token under the
policy, r the same under the frozen reference, n = tokens of a response. What a batch of pairs sums to, and how a
gradient gets to the trainer, is in cookbook/preference_step.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cookbook.errors import ShapeError

if TYPE_CHECKING:
    from cookbook.config import DPOConfig, ORPOConfig

__all__ = ["DPO", "ORPO", "PairLoss", "PairReference", "PreferenceObjective", "objective_of", "preferred"]

MEAN_LOGPROB_MIN = -50.0
MEAN_LOGPROB_MAX = -1e-6
"""Nats a token. Above, log(1 - p) of the odds is lost to rounding: the odds of a certain answer are infinite."""


@dataclass(frozen=True)
class PairReference:
    """Log-probabilities of both answers under the reference: sums over the response tokens, in nats."""

    chosen: float
    rejected: float

    @property
    def is_finite(self) -> bool:
        """Whether both numbers are."""
        return math.isfinite(self.chosen) and math.isfinite(self.rejected)


@dataclass(frozen=True, eq=False)
class PairLoss:
    """One pair's loss and what comes with it."""

    loss: float
    """Nats."""
    chosen_gradient: Tensor
    """d loss / d l, float64 (n_c,)"""
    rejected_gradient: Tensor
    """d loss / d l, float64 (n_d,)"""
    metrics: dict[str, float]
    """By "group/name", listed at the objective."""


class PreferenceObjective(Protocol):
    """What a recipe on pairs minimizes."""

    @property
    def name(self) -> str:
        """dpo or orpo."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `evaluate` needs the pair's `PairReference`."""
        ...

    def evaluate(self, chosen: Tensor, rejected: Tensor, reference: PairReference | None = None) -> PairLoss:
        """Loss and gradients of one pair.

        Args:
            chosen, rejected: (n_c,) and (n_d,), l of the response tokens, in nats; any float type. Prompt tokens are
                not among them. What they carry as gradient is ignored: the gradient is a result.
            reference: of the same tokens.

        Raises:
            ShapeError: a response without tokens, or a reference that is missing where it is needed.
        """
        ...


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization.

    loss = -log sigmoid(beta D), D = [sum_c l - sum_c r] - [sum_d l - sum_d r]
    d loss / d l = -beta sigmoid(-beta D) for each chosen token, +beta sigmoid(-beta D) for each rejected one.
    Rafailov et al. 2023, arXiv:2305.18290, equation 7. Sums over the response, not means.

    Metrics: preference/margin = D, in nats, without beta; preference/accuracy = 1 where D > 0, 0.5 where it is 0;
    preference/chosen_reward and rejected_reward = beta (sum l - sum r); preference/chosen_logprob and rejected_logprob,
    nats a token; preference/chosen_tokens and rejected_tokens.

    >>> log2 = DPO(0.1).evaluate(torch.tensor([-1.0]), torch.tensor([-3.0]), PairReference(-1.0, -3.0))
    >>> round(log2.loss, 4), log2.chosen_gradient.tolist(), log2.metrics["preference/accuracy"]
    (0.6931, [-0.05], 0.5)
    """

    beta: float
    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True

    def evaluate(self, chosen: Tensor, rejected: Tensor, reference: PairReference | None = None) -> PairLoss:
        """See `PreferenceObjective`."""
        chosen, rejected = _response("chosen", chosen), _response("rejected", rejected)
        if reference is None:
            raise ShapeError("DPO needs the reference logprobs of every pair, and there are none for this one.")
        chosen_ratio = _sum(chosen) - reference.chosen
        rejected_ratio = _sum(rejected) - reference.rejected
        margin = chosen_ratio - rejected_ratio
        scaled = torch.tensor(self.beta * margin, dtype=torch.float64)
        slope = self.beta * torch.sigmoid(-scaled)
        metrics = {
            "preference/margin": margin,
            "preference/accuracy": preferred(margin),
            "preference/chosen_reward": self.beta * chosen_ratio,
            "preference/rejected_reward": self.beta * rejected_ratio,
            **_response_metrics(chosen, rejected),
        }
        return PairLoss(
            loss=float(-logsigmoid(scaled)),
            chosen_gradient=-slope * torch.ones_like(chosen),
            rejected_gradient=slope * torch.ones_like(rejected),
            metrics=metrics,
        )


@dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimization; no reference.

    a = mean of l over the response, m = a clamped to [-50, -1e-6], logit(m) = m - log(1 - exp(m))
    L = logit(m_c) - logit(m_d), the log odds ratio
    loss = -a_c + orpo_lambda (-log sigmoid(L))
    d loss / d l = -(1 + orpo_lambda sigmoid(-L) / (1 - exp(m_c))) / n_c for each chosen token,
    +orpo_lambda sigmoid(-L) / (1 - exp(m_d)) / n_d for each rejected one; the second term is 0 where the clamp binds.
    Hong et al. 2024, arXiv:2403.07691, equations 4 to 7.

    Metrics: preference/margin = L; preference/accuracy = 1 where L > 0, 0.5 where it is 0; preference/chosen_reward and
    rejected_reward = orpo_lambda a; the other preference/ ones as for DPO; orpo/nll = -a_c, nats a token;
    orpo/odds_ratio_loss = -log sigmoid(L), without orpo_lambda.

    >>> even = ORPO(1.0).evaluate(torch.tensor([-0.6931472]), torch.tensor([-0.6931472]))
    >>> round(even.loss, 4), round(float(even.chosen_gradient), 4), round(float(even.rejected_gradient), 4)
    (1.3863, -2.0, 1.0)
    """

    orpo_lambda: float
    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False

    def evaluate(self, chosen: Tensor, rejected: Tensor, reference: PairReference | None = None) -> PairLoss:
        """See `PreferenceObjective`; `reference` is not looked at."""
        chosen, rejected = _response("chosen", chosen), _response("rejected", rejected)
        chosen_logit, chosen_slope = _logit(chosen.mean())
        rejected_logit, rejected_slope = _logit(rejected.mean())
        log_odds_ratio = chosen_logit - rejected_logit
        weight = self.orpo_lambda * torch.sigmoid(-log_odds_ratio)
        nll, odds_ratio_loss = float(-chosen.mean()), float(-logsigmoid(log_odds_ratio))
        metrics = {
            "preference/margin": float(log_odds_ratio),
            "preference/accuracy": preferred(float(log_odds_ratio)),
            "preference/chosen_reward": self.orpo_lambda * float(chosen.mean()),
            "preference/rejected_reward": self.orpo_lambda * float(rejected.mean()),
            **_response_metrics(chosen, rejected),
            "orpo/nll": nll,
            "orpo/odds_ratio_loss": odds_ratio_loss,
        }
        return PairLoss(
            loss=nll + self.orpo_lambda * odds_ratio_loss,
            chosen_gradient=-(1 + weight * chosen_slope) / len(chosen) * torch.ones_like(chosen),
            rejected_gradient=weight * rejected_slope / len(rejected) * torch.ones_like(rejected),
            metrics=metrics,
        )


def objective_of(config: DPOConfig | ORPOConfig) -> PreferenceObjective:
    """What `config` minimizes."""
    from cookbook.config import ORPOConfig  # not at the top: a trainer loads this package too, and has no configs

    return ORPO(config.orpo_lambda) if isinstance(config, ORPOConfig) else DPO(config.beta)


def preferred(margin: float) -> float:
    """1 where the chosen answer leads, 0 where the rejected one does, 0.5 for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def _response(side: str, logprobs: Tensor) -> Tensor:
    if logprobs.ndim != 1 or len(logprobs) == 0:
        raise ShapeError(
            f"the {side} answer's logprobs have shape {tuple(logprobs.shape)}. There must be one for each response "
            "token, and at least one token."
        )
    return logprobs.detach().double()


def _sum(logprobs: Tensor) -> float:
    """Correctly rounded: the margin of a policy that equals its reference is exactly 0, however either was summed."""
    values: list[float] = logprobs.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _logit(mean: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) of p = exp(clamped mean), and its derivative 1 / (1 - p), 0 where the clamp binds."""
    clamped = mean.clamp(MEAN_LOGPROB_MIN, MEAN_LOGPROB_MAX)
    complement = -torch.expm1(clamped)  # 1 - p without cancellation near p = 1
    slope = torch.where(clamped == mean, 1 / complement, 0.0)
    # log1p for small p, where 1 - p has lost p.
    log_complement = torch.where(clamped < -math.log(2), torch.log1p(-clamped.exp()), complement.log())
    return clamped - log_complement, slope


def _response_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    return {
        "preference/chosen_logprob": float(chosen.mean()),
        "preference/rejected_logprob": float(rejected.mean()),
        "preference/chosen_tokens": float(len(chosen)),
        "preference/rejected_tokens": float(len(rejected)),
    }
