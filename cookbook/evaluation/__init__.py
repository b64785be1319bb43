"""Evaluation of the policy."""

from cookbook.evaluation.held_out import EvalResult, evaluate_held_out

__all__ = ["EvalResult", "evaluate_held_out"]
