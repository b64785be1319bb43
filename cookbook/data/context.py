"""How many tokens a sequence of a run may have: what the config asks for, within what shape and model can take."""

from __future__ import annotations

from pathlib import Path

from cookbook.config import RecipeConfig
from cookbook.errors import ConfigError, Problem
from cookbook.models import context_length, resolve_model

__all__ = ["context_limit"]


def context_limit(config: RecipeConfig, models_dir: Path, shape_context: int | None) -> int:
    """`max_seq_len`, or the context length of the training shape or of the local model where it is None.

    Raises:
        ConfigError: `max_seq_len` is above one of them, or it is None and nothing tells the context length.
        ModelError: the local model cannot be read.
    """
    limits = {"training shape": shape_context} if shape_context is not None else {}
    if config.backend == "embedded":
        limits["model"] = context_length(resolve_model(config.base_model, models_dir))
    owner = min(limits, key=lambda name: limits[name]) if limits else None
    if config.max_seq_len is None:
        if owner is None:
            what = "is None, and neither a training shape nor a local model tells the context length."
            raise ConfigError([Problem("max_seq_len", what, "Set it.")])
        return limits[owner]
    if owner is not None and config.max_seq_len > limits[owner]:
        what = f"is {config.max_seq_len}, above the context length of the {owner}, {limits[owner]} tokens."
        raise ConfigError([Problem("max_seq_len", what, "Lower it, or leave it out to use the whole context.")])
    return config.max_seq_len
