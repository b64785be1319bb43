"""Evaluation of a model on held-out data."""

from cookbook.evaluation.held_out import EvalResult, evaluate_held_out

__all__ = ["EvalResult", "evaluate_held_out"]
