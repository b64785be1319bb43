"""How a run ended, in one record: kept as summary.json, printed, and shown as a Prefect artifact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunSummary"]


@dataclass(frozen=True)
class RunSummary:
    """The end of a run. Plain values only, so that it can be JSON and a Prefect result."""

    run_id: str
    recipe: str
    status: str
    """"completed"."""
    log_path: str
    base_model: str
    steps: int
    epochs: int
    rows_consumed: int
    trained_tokens: int
    resumed_from_step: int | None
    """Step of the commit from which the last start of this run went on. None = it began at step 0."""
    train_seconds: float
    """Wall seconds in training steps of the last start."""
    tokens_per_second: float
    """Tokens, context included, through training steps of the last start, a second. 0 = it trained none."""
    final_loss: float | None
    """Training loss of the last step in nats a token."""
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """"before" and "after": loss (nats a token), token_accuracy, exact_match, num_tokens, num_rows."""
    checkpoint: str | None = None
    """Name of the last committed checkpoint."""
    checkpoint_path: str | None = None
    model: str | None = None
    """Resource name of the promoted model."""
    model_folder: str | None = None
    """Its folder, where the backend is embedded."""
    prefect_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls of each task, and how many of them Prefect recorded."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSummary:
        """The inverse of `to_dict`; keys that this version does not know are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Aligned lines for a terminal."""
        table = self._table()
        width = max(len(name) for name, _ in table)
        lines = [f"  {name:<{width}}  {value}" for name, value in table]
        return "\n".join([f"Run {self.run_id}: {self.status}", *lines])

    def to_markdown(self) -> str:
        """A table for a Prefect artifact."""
        rows = [f"| {name} | {value} |" for name, value in self._table()]
        title = f"## {self.recipe.upper()} run {self.run_id}: {self.status}"
        return "\n".join([title, "", "| | |", "|---|---|", *rows]) + "\n"

    def _table(self) -> list[tuple[str, str]]:
        table = [("base model", self.base_model), ("trained", self._trained())]
        if self.resumed_from_step is not None:
            table.append(("resumed from", f"step {self.resumed_from_step:,}"))
        if self.tokens_per_second:
            seconds = f"{self.train_seconds:,.1f} s in training steps"
            table.append(("speed", f"{self.tokens_per_second:,.0f} tok/s ({seconds})"))
        table += self._comparisons()
        if self.checkpoint is not None:
            table.append(("checkpoint", f"{self.checkpoint} ({self.checkpoint_path})"))
        if self.model is not None:
            table.append(("model", f"{self.model}" + (f" ({self.model_folder})" if self.model_folder else "")))
        return [*table, ("run directory", self.log_path)]

    def _trained(self) -> str:
        epochs = "epoch" if self.epochs == 1 else "epochs"
        rows = f"{self.rows_consumed:,} rows, {self.trained_tokens:,} trained tokens"
        return f"{self.steps:,} steps, {self.epochs} {epochs}, {rows}"

    def _comparisons(self) -> list[tuple[str, str]]:
        before, after = self.evaluation.get("before"), self.evaluation.get("after")
        if before is None or after is None:
            return []
        rows = f"({after['num_rows']:,.0f} rows)"
        return [
            ("held-out loss", f"{before['loss']:.4f} -> {after['loss']:.4f} nats a token {rows}"),
            ("held-out token accuracy", f"{before['token_accuracy']:.1%} -> {after['token_accuracy']:.1%}"),
            ("held-out exact match", f"{before['exact_match']:.1%} -> {after['exact_match']:.1%}"),
        ]
