"""Where a run's numbers go: metrics.jsonl, Weights & Biases, the files of an outer orchestrator, the terminal.

Importing this imports neither torch nor wandb; wandb comes in when a run with a W&B project starts to train.
"""

from cookbook.tracking.sink import LEARNING_RATE, LOSS, STEP_TOKENS, TOKENS_PER_S, GoesOn, Sink, Start
from cookbook.tracking.tracker import Tracker, open_tracker

__all__ = ["LEARNING_RATE", "LOSS", "STEP_TOKENS", "TOKENS_PER_S", "GoesOn", "Sink", "Start", "Tracker", "open_tracker"]
