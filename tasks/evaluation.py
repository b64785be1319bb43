"""Held-out evaluation of the policy, on its trainer."""

from __future__ import annotations

from cookbook.config import SFTConfig
from cookbook.data.sft import SFTData
from cookbook.evaluation import evaluate_held_out
from cookbook.run import Progress
from tasks.record import recorded
from tasks.run import Run

__all__ = ["evaluate"]


def evaluate(run: Run, data: SFTData, progress: Progress) -> None:
    """Evaluate on the held-out rows, unless there are none or this step was evaluated already."""
    if data.held_out is not None and progress.step not in run.evaluations():
        held_out_loss(run, data, progress)


@recorded(deadline=lambda config: config.evaluation.timeout_s, retried=True, persist=True)
def held_out_loss(run: Run, data: SFTData, progress: Progress) -> dict[str, float]:
    """Loss (nats a token), token accuracy and exact match over the held-out rows."""
    assert isinstance(run.config, SFTConfig)
    result = evaluate_held_out(run.client, data.held_out_rows(), timeout_s=run.config.evaluation.timeout_s)
    values = result.to_dict()
    run.log_evaluation(progress, values)
    return values
