"""Evaluation of a model on held-out data."""

from cookbook.evaluation.answers import Answer
from cookbook.evaluation.greedy import GreedyEvaluation, evaluate_greedy
from cookbook.evaluation.held_out import EvalResult, evaluate_held_out
from cookbook.evaluation.preferences import PreferenceEvalResult, evaluate_preferences

__all__ = [
    "Answer",
    "EvalResult",
    "GreedyEvaluation",
    "PreferenceEvalResult",
    "evaluate_greedy",
    "evaluate_held_out",
    "evaluate_preferences",
]
