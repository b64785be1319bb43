"""The result of an evaluation: each measure of each model with its interval, and every answer, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cookbook.errors import CheckpointError
from cookbook.evaluation.answers import Answer, ReferenceLoss
from cookbook.evaluation.bootstrap import Bootstrap, Estimate
from cookbook.evaluation.passes import pass_at
from cookbook.evaluation_config import AGAINST, MODEL, EvaluationConfig
from cookbook.files import read_json, read_jsonl, replace_jsonl, write_json
from cookbook.run import EVALUATION_FILE

__all__ = ["ANSWERS_FILE", "EvaluationReport", "RowResult", "make_report"]

ANSWERS_FILE = "answers.jsonl"

LOSS = "loss"
_LONGEST_CELL = 300


@dataclass(frozen=True)
class RowResult:
    """One row with all that was said to it."""

    index: int
    """Row in the data file, 0-based."""
    prompt: str
    """Content of the last message."""
    reference: str | None
    """The reference answer, where the row has one."""
    answers: Mapping[str, Sequence[Answer]] = field(repr=False)
    """Role -> its answers; none where nothing was to be measured on them."""
    losses: Mapping[str, ReferenceLoss] = field(default_factory=dict, repr=False)
    """Role -> what it makes of the reference answer."""
    wins: tuple[float, ...] = ()
    """With two models: for each sample 1 where `model` won, 0 where it lost, 0.5 for a tie."""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON data."""
        answers = {role: [_told(answer) for answer in answers] for role, answers in self.answers.items()}
        told: dict[str, Any] = {"row": self.index, "prompt": self.prompt, "reference": self.reference}
        told |= {"answers": answers, "wins": list(self.wins)}
        told["losses"] = {role: {"nats": found.nats, "tokens": found.num_tokens} for role, found in self.losses.items()}
        return told

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> RowResult:
        """The inverse of `to_dict`."""
        index, prompt = told["row"], told["prompt"]
        answers = {
            role: [Answer(index=index, prompt=prompt, **answer) for answer in answers]
            for role, answers in told["answers"].items()
        }
        losses = {role: ReferenceLoss(index, found["nats"], found["tokens"]) for role, found in told["losses"].items()}
        return cls(index, prompt, told["reference"], answers, losses, tuple(told["wins"]))

    def reward(self, role: str) -> float | None:
        """Mean reward of a model's answers; None where there is no reward."""
        rewards = [answer.reward for answer in self.answers[role] if answer.reward is not None]
        return fmean(rewards) if rewards else None


@dataclass(frozen=True)
class EvaluationReport:
    """How a model did, or two side by side."""

    run_id: str
    log_path: str
    dataset: str
    num_rows: int
    samples_per_row: int
    temperature: float
    confidence: float
    """Of the intervals."""
    models: dict[str, str]
    """Role -> model: "model", and "against" where there are two."""
    measures: dict[str, dict[str, Estimate]]
    """Role -> measure -> mean over rows. loss: nats a token of the reference answers, each token alike. reward, and
    reward/<part>; pass@<k>; tokens_per_answer; truncated_share: answers that were cut at max_completion_tokens."""
    difference: dict[str, Estimate] = field(default_factory=dict)
    """Measure -> model less against, its interval over rows that both answered."""
    win_rate: Estimate | None = None
    """Share of the answers of `model` that won, a tie being half a win."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """"won", "tied", "lost": pairs of answers."""
    versions: dict[str, str] = field(default_factory=dict)
    """Role -> hot-loaded snapshot that was measured; without one, the model as it was deployed."""
    notes: tuple[str, ...] = ()
    results: tuple[RowResult, ...] = field(default=(), repr=False)

    @property
    def evaluation(self) -> dict[str, dict[str, float]]:
        """Role -> measure -> value, and the "difference" and "win_rate": plain numbers for a tracker. The ends of an
        interval are beside its value, as <measure>_low and <measure>_high."""
        found = {**self.measures, "difference": self.difference}
        if self.win_rate is not None:
            found["win_rate"] = {"win_rate": self.win_rate}
        return {group: _numbers(values) for group, values in found.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data, less the answers."""
        measures = {role: _dicts(estimates) for role, estimates in self.measures.items()}
        return {
            "run_id": self.run_id,
            "log_path": self.log_path,
            "dataset": self.dataset,
            "num_rows": self.num_rows,
            "samples_per_row": self.samples_per_row,
            "temperature": self.temperature,
            "confidence": self.confidence,
            "models": self.models,
            "versions": self.versions,
            "measures": measures,
            "difference": _dicts(self.difference),
            "win_rate": None if self.win_rate is None else self.win_rate.to_dict(),
            "outcomes": self.outcomes,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any], results: Sequence[RowResult] = ()) -> EvaluationReport:
        """The inverse of `to_dict`; keys that this version does not know are left out."""
        plain = ("run_id", "log_path", "dataset", "num_rows", "samples_per_row", "temperature", "confidence")
        return cls(
            **{name: told[name] for name in (*plain, "models", "outcomes")},
            measures={role: _estimates(values) for role, values in told["measures"].items()},
            difference=_estimates(told["difference"]),
            win_rate=None if told["win_rate"] is None else Estimate(**told["win_rate"]),
            versions=told.get("versions", {}),
            notes=tuple(told["notes"]),
            results=tuple(results),
        )

    def write(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write every answer to answers.jsonl, then the report with `extra` to evaluation.json: that ends it.

        Raises:
            CheckpointError: the files cannot be written.
        """
        replace_jsonl(folder / ANSWERS_FILE, [result.to_dict() for result in self.results])
        write_json(folder / EVALUATION_FILE, {**self.to_dict(), **extra})

    @classmethod
    def read(cls, folder: Path) -> tuple[EvaluationReport, dict[str, Any]] | None:
        """The report in a run directory, and all that was written with it; None while there is none.

        Raises:
            CheckpointError: it is damaged, or has not the answers that it was made of.
        """
        told = read_json(folder / EVALUATION_FILE)
        if told is None:
            return None
        try:
            report = cls.from_dict(told, [RowResult.from_dict(row) for row in read_jsonl(folder / ANSWERS_FILE)])
        except (KeyError, TypeError) as error:
            what = f"{folder / EVALUATION_FILE} or {ANSWERS_FILE} beside it is damaged: {error!r}."
            raise CheckpointError(f"{what} Restore it, or use a new log_path.") from error
        if len(report.results) != report.num_rows:
            what = f"{folder / ANSWERS_FILE} has {len(report.results)} rows, and its report is of {report.num_rows}."
            raise CheckpointError(f"{what} Restore it, or use a new log_path.")
        return report, told

    # -- for people ----------------------------------------------------------------------------------------------------

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows for a table: the first answer of each model side by side, and what it was worth."""
        return [self._row(result) for result in self.results[:limit]]

    def _row(self, result: RowResult) -> dict[str, Any]:
        row: dict[str, Any] = {"row": result.index, "prompt": _shortened(result.prompt)}
        row["reference"] = None if result.reference is None else _shortened(result.reference)
        for role in self.models:
            row[role] = _shortened(result.answers[role][0].text) if result.answers[role] else None
            row[f"{role}_reward"] = result.reward(role)
            loss = result.losses.get(role)
            row[f"{role}_loss"] = None if loss is None else loss.nats / loss.num_tokens
        row["win"] = fmean(result.wins) if result.wins else None
        return row

    def to_text(self) -> str:
        """Aligned lines for a terminal."""
        head, *table = self._table()
        widths = [max(len(line[i]) for line in (head, *table)) for i in range(len(head))]
        cells = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *table)
        )
        lines = [f"Evaluation {self.run_id}: {self._what()}", "", *(f"  {line}".rstrip() for line in cells), ""]
        lines += [f"  {line}" for line in self._remarks()]
        return "\n".join([*lines, f"  every row: {Path(self.log_path) / ANSWERS_FILE}"])

    def to_markdown(self) -> str:
        """A table for a Prefect artifact."""
        head, *table = self._table()
        rows = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *table)]
        remarks = [f"* {line}" for line in self._remarks()]
        return "\n".join([f"## Evaluation {self.run_id}", "", self._what(), "", *rows, "", *remarks]) + "\n"

    def _what(self) -> str:
        rows = f"{self.num_rows:,} rows of {self.dataset}"
        if self.samples_per_row == 0:
            return f"{rows}, no answers"
        answers = "1 answer each" if self.samples_per_row == 1 else f"{self.samples_per_row} answers each"
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{rows}, {answers}, {how}"

    def _name(self, role: str) -> str:
        """What was measured in this role."""
        version = self.versions.get(role)
        return f"{self.models[role]} with snapshot {version}" if version else self.models[role]

    def _table(self) -> list[list[str]]:
        """Header, then a line a measure: a cell for each model, and for their difference."""
        head = ["measure", *map(self._name, self.models), *(["difference"] if self.difference else [])]
        lines = [head]
        for name in self.measures[MODEL]:
            label, form = _labelled(name)
            cells = [_shown(self.measures[role].get(name), form) for role in self.models]
            if self.difference:
                cells.append(_shown(self.difference.get(name), form, sign="+"))
            lines.append([label, *cells])
        return lines

    def _remarks(self) -> list[str]:
        remarks = []
        if self.win_rate is not None:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.items())
            text = f"{self._name(MODEL)} wins {_shown(self.win_rate, '.1%')} against {self._name(AGAINST)}"
            remarks.append(f"{text} ({counts}; a tie is half a win)")
        remarks.append(f"in brackets: {self.confidence:.0%} bootstrap intervals over rows")
        return [*remarks, *self.notes]


def make_report(
    config: EvaluationConfig,
    run_id: str,
    log_path: Path,
    results: Sequence[RowResult],
    *,
    same_tokens: bool,
    versions: Mapping[str, str] | None = None,
) -> EvaluationReport:
    """Means and intervals of what was measured. Every row counts alike, and every token of the reference answers.

    Args:
        results: at least one row.
        same_tokens: whether the models have one tokenizer; else their losses are not compared.
        versions: role -> snapshot that it served, where one was hot loaded.
    """
    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, config.seed)
    columns = {role: _columns(results, role, config) for role in config.models}
    measures = {
        role: {name: bootstrap.mean(*column) for name, column in found.items()} for role, found in columns.items()
    }
    difference: dict[str, Estimate] = {}
    notes = _part_notes(results, config)
    if not config.wants_answers:
        notes.append("no answers were sampled: without a reward or a second model nothing is measured on them")
    if config.against is not None:
        one, other = columns[MODEL], columns[AGAINST]
        shared = [name for name in one if name in other and (name != LOSS or same_tokens)]
        difference = {name: bootstrap.mean(*one[name], minus=other[name]) for name in shared}
        if LOSS in one and not same_tokens:
            notes.append("the models have different tokenizers: their losses a token cannot be compared")
    wins = [value for result in results for value in result.wins]
    return EvaluationReport(
        run_id=run_id,
        log_path=str(log_path),
        dataset=config.dataset,
        num_rows=len(results),
        samples_per_row=config.samples_per_row if config.wants_answers else 0,
        temperature=config.sampling_temperature,
        confidence=config.confidence,
        models=config.models,
        measures=measures,
        difference=difference,
        win_rate=bootstrap.mean([fmean(result.wins) for result in results]) if wins else None,
        outcomes=_outcomes(wins),
        versions={role: version for role, version in (versions or {}).items() if version},
        notes=tuple(notes),
        results=tuple(results),
    )


_Column = tuple[NDArray[np.float64], NDArray[np.float64] | None]


def _columns(results: Sequence[RowResult], role: str, config: EvaluationConfig) -> dict[str, _Column]:
    """Measure -> what each row adds to it, and what each row counts (None = 1). An absent part of a reward is 0."""
    found: dict[str, _Column] = {}
    losses = [result.losses[role] for result in results if role in result.losses]
    if losses:
        found[LOSS] = np.array([loss.nats for loss in losses]), np.array([float(loss.num_tokens) for loss in losses])
    answers_R = [result.answers[role] for result in results]
    if not config.wants_answers:
        return found
    if config.reward is not None:
        found["reward"] = np.array([fmean(_rewards(answers)) for answers in answers_R]), None
        right_R = [sum(reward >= config.pass_threshold for reward in _rewards(answers)) for answers in answers_R]
        for k in sorted(config.pass_at):
            values = [pass_at(k, len(answers), right) for answers, right in zip(answers_R, right_R, strict=True)]
            found[f"pass@{k}"] = np.array(values), None
        for name in sorted({name for answers in answers_R for answer in answers for name in answer.parts}):
            found[f"reward/{name}"] = _means(answers_R, lambda answer, name=name: answer.parts.get(name, 0.0)), None
    found["tokens_per_answer"] = _means(answers_R, lambda answer: float(answer.num_tokens)), None
    found["truncated_share"] = _means(answers_R, lambda answer: float(answer.finish_reason == "length")), None
    return found


def _part_notes(results: Sequence[RowResult], config: EvaluationConfig) -> list[str]:
    """A line for each part of the reward that some answers did not get."""
    notes = []
    for role, model in config.models.items():
        parts = [answer.parts for result in results for answer in result.answers[role]]
        for name in sorted({name for each in parts for name in each}):
            absent = sum(name not in each for each in parts)
            if absent:
                notes.append(f"reward/{name} of {model}: {absent:,} of {len(parts):,} answers lack it, and count as 0")
    return notes


def _means(answers_R: Sequence[Sequence[Answer]], number: Any) -> NDArray[np.float64]:
    return np.array([fmean(number(answer) for answer in answers) for answers in answers_R])


def _rewards(answers: Sequence[Answer]) -> list[float]:
    return [answer.reward for answer in answers if answer.reward is not None]


def _outcomes(wins: Sequence[float]) -> dict[str, int]:
    if not wins:
        return {}
    won, lost = sum(value > 0.5 for value in wins), sum(value < 0.5 for value in wins)
    return {"won": won, "tied": len(wins) - won - lost, "lost": lost}


def _told(answer: Answer) -> dict[str, Any]:
    """An answer inside its row, which says the rest."""
    return {name: value for name, value in answer.to_dict().items() if name not in ("index", "prompt")}


def _numbers(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Values and the ends of their intervals, by name."""
    found: dict[str, float] = {}
    for name, each in estimates.items():
        ends = {"": each.value, "_low": each.low, "_high": each.high}
        found |= {f"{name}{end}": value for end, value in ends.items() if value is not None}
    return found


def _dicts(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_dict() for name, estimate in estimates.items()}


def _estimates(told: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**estimate) for name, estimate in told.items()}


_LABELS = {
    LOSS: ("held-out loss, nats a token", ".4f"),
    "tokens_per_answer": ("tokens an answer", ".1f"),
    "truncated_share": ("answers cut short", ".1%"),
}


def _labelled(name: str) -> tuple[str, str]:
    """How a measure is named and formatted."""
    return _LABELS.get(name, (name, ".1%" if name.startswith("pass@") else ".3f"))


def _shown(estimate: Estimate | None, form: str, sign: str = "") -> str:
    if estimate is None:
        return "-"
    text = f"{estimate.value:{sign}{form}}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{sign}{form}}, {estimate.high:{sign}{form}}]"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."
