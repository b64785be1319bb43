"""What was sampled for each step, on disk before it is trained: a resumed run trains the same groups again.

One file a step, `step-000012.jsonl`: a head, a line a group, a line a rejected row, and an end. JSON keeps every
float as it is, so the step comes out bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cookbook.errors import CheckpointError, DataError
from cookbook.rollouts.ledger import CollectedStep, RowLedger
from cookbook.rollouts.records import Completion, PromptGroup, RejectedRow

__all__ = ["ROLLOUTS_FOLDER", "RolloutStore"]

ROLLOUTS_FOLDER = "rollouts"
"""Folder of a run directory."""

_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})\.jsonl")

logger = logging.getLogger(__name__)


class RolloutStore:
    """The recorded steps of a run, in a folder of their own.

    >>> store = RolloutStore(Path("runs/a/rollouts"))
    >>> store.read_step(0) is None
    True
    """

    def __init__(self, path: Path, fingerprint: str = "") -> None:
        """The folder is made with the first step.

        Args:
            fingerprint: of whatever changes a run's numbers. A step that was recorded under another one is none.
        """
        self.path = path
        self.fingerprint = fingerprint

    def write_step(self, step: int, collected: CollectedStep) -> Path:
        """Record what the step after `step` done ones is trained on; returns its file. To be called before training.

        The file appears whole or not at all, and is on the disk when this returns. Later steps are dropped: they
        followed upon another course of the run.

        Raises:
            CheckpointError: the file cannot be written, or a row of the data is not JSON.
        """
        path = self._file(step)
        self.drop_after(step)
        temporary = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=self.path)
            with open(descriptor, "w", encoding="utf-8") as file:
                for record in _records(step, collected, self.fingerprint):
                    file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            temporary = None
            _sync_folder(self.path)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be written: a group is not JSON: {error}.") from error
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}. Free space, then resume."
            ) from error
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
        return path

    def read_step(self, step: int, before: RowLedger | None = None) -> CollectedStep | None:
        """What was recorded for the step after `step` done ones; None when nothing was.

        With `before`, the ledger that the step starts from, a record that does not follow upon it is none.

        Raises:
            CheckpointError: the file is damaged or cannot be read.
        """
        path = self._file(step)
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            collected = _read([json.loads(line) for line in lines], step)
        except (KeyError, TypeError, ValueError, DataError, IndexError) as error:
            raise CheckpointError(
                f"{path} is damaged: {type(error).__name__}: {error}. Restore it, or remove it: then the step is "
                "sampled anew."
            ) from error
        if json.loads(lines[0]).get("fingerprint", "") != self.fingerprint:
            logger.warning("%s was sampled with another config or other data; the step is sampled anew", path)
            return None
        if before is not None and not collected.follows(before):
            logger.warning("%s does not follow upon the rows of step %d; the step is sampled anew", path, step)
            return None
        return collected

    def steps(self) -> list[int]:
        """The steps that are recorded, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.path.glob("step-*.jsonl"))
        return sorted(int(name[1]) for name in names if name is not None)

    def drop_after(self, step: int) -> None:
        """Forget all steps above `step`."""
        self._remove(recorded for recorded in self.steps() if recorded > step)

    def prune(self, before: int) -> None:
        """Forget all steps below `before`: those that a commit has made needless."""
        self._remove(recorded for recorded in self.steps() if recorded < before)

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step:06d}.jsonl"

    def _remove(self, steps: Iterator[int]) -> None:
        for step in steps:
            try:
                self._file(step).unlink(missing_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self._file(step)} cannot be removed: {error.strerror or error}.") from error


def _records(step: int, collected: CollectedStep, fingerprint: str) -> Iterator[dict[str, Any]]:
    head = {"kind": "head", "format": _FORMAT, "step": step, "version": collected.version, "fingerprint": fingerprint}
    yield head | {"ledger": collected.ledger.to_dict()}
    for group in collected.groups:
        yield {"kind": "group", **_group_to_dict(group)}
    for row in collected.rejected:
        yield {"kind": "rejected", **dataclasses.asdict(row)}
    yield {"kind": "end", "groups": len(collected.groups), "rejected": len(collected.rejected)}


def _read(records: list[dict[str, Any]], step: int) -> CollectedStep:
    """The step again.

    Raises:
        KeyError, TypeError, ValueError: a line is missing or is not what it should be.
    """
    head, end = records[0], records[-1]
    groups = tuple(_group_from_dict(record) for record in records if record["kind"] == "group")
    rejected = tuple(
        RejectedRow(record["row"], record["index"], record["reason"], tuple(record["rewards"]))
        for record in records
        if record["kind"] == "rejected"
    )
    found = {"head": head["kind"], "format": head["format"], "step": head["step"], "end": end["kind"]}
    found |= {"groups": end["groups"], "rejected": end["rejected"], "lines": len(records)}
    expected = {"head": "head", "format": _FORMAT, "step": step, "end": "end", "groups": len(groups)}
    expected |= {"rejected": len(rejected), "lines": 2 + len(groups) + len(rejected)}
    if found != expected:
        raise ValueError(f"expected {expected}, got {found}")
    return CollectedStep(groups, rejected, RowLedger.from_dict(head["ledger"]), str(head["version"]))


def _group_to_dict(group: PromptGroup) -> dict[str, Any]:
    values = {entry.name: getattr(group, entry.name) for entry in dataclasses.fields(group)}
    completions = [
        {entry.name: getattr(completion, entry.name) for entry in dataclasses.fields(completion)}
        | {"is_sampled": [int(flag) for flag in completion.is_sampled], "parts": dict(completion.parts)}
        for completion in group.completions
    ]
    return values | {"completions": completions, "fields": dict(group.fields)}


def _group_from_dict(values: Mapping[str, Any]) -> PromptGroup:
    tuples = ("tokens", "rollout_logprobs", "sampling_logprobs")
    completions = tuple(
        Completion(
            **completion
            | {name: tuple(completion[name]) for name in tuples}
            | {"is_sampled": tuple(map(bool, completion["is_sampled"]))}
        )
        for completion in values["completions"]
    )
    return PromptGroup(
        row=values["row"],
        index=values["index"],
        prompt_tokens=tuple(values["prompt_tokens"]),
        completions=completions,
        fields=values["fields"],
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
