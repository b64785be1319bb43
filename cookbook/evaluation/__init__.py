"""Evaluation of a model on held-out data."""

from cookbook.evaluation.greedy import Answer, GreedyEvaluation, evaluate_greedy
from cookbook.evaluation.held_out import EvalResult, evaluate_held_out

__all__ = ["Answer", "EvalResult", "GreedyEvaluation", "evaluate_greedy", "evaluate_held_out"]
