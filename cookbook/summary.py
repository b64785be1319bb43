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
    rows_rejected: int = 0
    """RL: rows that were sampled and not trained."""
    reward: dict[str, float] = field(default_factory=dict)
    """RL: "first" and "last": mean reward of the completions of the first and the last tenth of the steps."""
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """"before" and "after", on `num_rows` held-out rows or `num_pairs` pairs. SFT: loss (nats a token), token_accuracy,
    exact_match, num_tokens. DPO and ORPO: loss (nats), preference_accuracy and more. RL: reward (mean), and
    "reward/<part>" of what it was made of."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """RL: held-out rows with their "prompt", and what was answered "before" and "after" training."""
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
        return "\n".join([f"Run {self.run_id}: {self.status}", *lines, *self._samples_text()])

    def to_markdown(self) -> str:
        """Tables for a Prefect artifact."""
        rows = [f"| {name} | {value} |" for name, value in self._table()]
        title = f"## {self.recipe.upper()} run {self.run_id}: {self.status}"
        return "\n".join([title, "", "| | |", "|---|---|", *rows, *self._samples_markdown()]) + "\n"

    def _table(self) -> list[tuple[str, str]]:
        table = [("base model", self.base_model), ("trained", self._trained())]
        if self.resumed_from_step is not None:
            table.append(("resumed from", f"step {self.resumed_from_step:,}"))
        if self.tokens_per_second:
            seconds = f"{self.train_seconds:,.1f} s in training steps"
            table.append(("speed", f"{self.tokens_per_second:,.0f} tok/s ({seconds})"))
        if self.reward:
            text = f"{self.reward['first']:.3f} -> {self.reward['last']:.3f} (mean of the first and the last steps)"
            table.append(("reward while training", text))
        table += self._comparisons()
        if self.checkpoint is not None:
            table.append(("checkpoint", f"{self.checkpoint} ({self.checkpoint_path})"))
        if self.model is not None:
            table.append(("model", f"{self.model}" + (f" ({self.model_folder})" if self.model_folder else "")))
        return [*table, ("run directory", self.log_path)]

    def _trained(self) -> str:
        epochs = "epoch" if self.epochs == 1 else "epochs"
        rejected = f" ({self.rows_rejected:,} rejected)" if self.rows_rejected else ""
        rows = f"{self.rows_consumed:,} rows{rejected}, {self.trained_tokens:,} trained tokens"
        return f"{self.steps:,} steps, {self.epochs} {epochs}, {rows}"

    def _comparisons(self) -> list[tuple[str, str]]:
        """Each held-out number before and after, in the order in which they were measured."""
        before, after = self.evaluation.get("before"), self.evaluation.get("after")
        if before is None or after is None:
            return []
        lines = []
        for name, value in after.items():
            if name in before and not name.startswith("num_"):
                shown = _HELD_OUT.get(name, (name.replace("_", " "), ".3f", ""))
                lines.append((f"held-out {shown[0]}", f"{before[name]:{shown[1]}} -> {value:{shown[1]}}{shown[2]}"))
        name, text = lines[0]
        return [(name, f"{text}{_count(after)}"), *lines[1:]]

    def _samples_text(self) -> list[str]:
        """Answers to the same held-out rows, before and after training."""
        lines = [] if not self.samples else ["", "  Held-out rows, greedy answers:"]
        for sample in self.samples:
            lines.append(f"    {_one_line(sample['prompt'])}")
            lines += [f"      {when:<6}  {_one_line(sample[when])}" for when in ("before", "after") if when in sample]
        return lines

    def _samples_markdown(self) -> list[str]:
        if not self.samples:
            return []
        cells = [[_cell(sample.get(name, "")) for name in ("prompt", "before", "after")] for sample in self.samples]
        head = ["", "### Held-out rows, greedy answers", "", "| prompt | before | after |", "|---|---|---|"]
        return [*head, *(f"| {' | '.join(row)} |" for row in cells)]


_HELD_OUT = {
    "loss": ("loss", ".4f", " nats"),
    "chosen_logprob": ("logprob of chosen answers", ".3f", " nats a token"),
    "rejected_logprob": ("logprob of rejected answers", ".3f", " nats a token"),
    "margin": ("margin", ".3f", " nats"),
    "token_accuracy": ("token accuracy", ".1%", ""),
    "exact_match": ("exact match", ".1%", ""),
    "preference_accuracy": ("preference accuracy", ".1%", ""),
    "preference_accuracy_per_token": ("preference accuracy per token", ".1%", ""),
    "reward_accuracy": ("reward accuracy", ".1%", ""),
}
"""Held-out number -> how it is named, formatted and followed by its unit; others are shown by their own names."""

_LONGEST_LINE = 100


def _count(values: dict[str, float]) -> str:
    """How many rows or pairs the numbers are of."""
    counted = next((name for name in ("num_rows", "num_pairs") if name in values), None)
    return "" if counted is None else f" ({values[counted]:,.0f} {counted.removeprefix('num_')})"


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_LINE else flat[: _LONGEST_LINE - 3] + "..."


def _cell(text: str) -> str:
    """Text inside a Markdown table, where a bar or a tag would break it."""
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;")
