"""The evaluation of a model, or of two side by side, as a Prefect flow. What each line does: tasks/ and cookbook/."""

from __future__ import annotations

from prefect import flow

from cookbook.evaluation.report import EvaluationReport
from cookbook.evaluation_config import EvaluationConfig
from tasks.eval_run import open_evaluation
from tasks.model_evaluation import (
    judge_answers,
    measure_loss,
    preflight_evaluation,
    provision_model,
    release_model,
    sample_answers,
)
from tasks.run import run_name

__all__ = ["evaluate"]


@flow(name="eval", flow_run_name=run_name)
def evaluate(config: EvaluationConfig) -> EvaluationReport:
    """Held-out loss, reward, pass@k and win rate, each with a bootstrap interval over rows.

    Both models answer the same rows under the same seeds, one after the other. Run it again with the same log_path: an
    evaluation that was killed goes on with what is missing, and a finished one gives its result.
    """
    with open_evaluation(config) as run:
        if (report := run.finished()) is not None:
            return report

        preflight_evaluation(run)  # every row rendered, reward and judge tried, before anything costs money
        for role in config.models:
            provision_model(run, role)  # each model has the hardware to itself
            measure_loss(run, role)  # of the reference answers, where rows have them
            sample_answers(run, role)  # where a reward or a second model makes something of them
            release_model(run)
        judge_answers(run)
        return run.finish()
