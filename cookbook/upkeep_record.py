"""upkeep.json of a run directory: when its checkpoints were last pruned and mirrored, and what keeps them from it.

Only news for people, and what the mirror must remember; nothing that a restore needs. Written by the run's owner.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cookbook.errors import CheckpointError
from cookbook.files import read_json, write_json
from cookbook.run import RunDirectory

__all__ = ["UPKEEP_FILE", "UpkeepRecord", "read_upkeep", "upkeep_text"]

UPKEEP_FILE = "upkeep.json"

logger = logging.getLogger(__name__)


class UpkeepRecord:
    """upkeep.json of an open run, part by part. Says a problem once each time that it begins."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._failing: set[str] = set()

    def facts(self, part: str) -> Mapping[str, Any]:
        """What is written of a part; {} when nothing is."""
        return read_upkeep(self._directory.path).get(part, {})

    def is_failing(self, part: str) -> bool:
        """Whether the part has failed since it last succeeded, in this process."""
        return part in self._failing

    def note(self, part: str, facts: Mapping[str, Any]) -> None:
        """Write something down that the part must remember.

        Raises:
            LeaseLost: another process owns the run.
            CheckpointError: the file cannot be written.
        """
        with self._directory.guard():
            contents = read_upkeep(self._directory.path)
            present = contents.get(part, {})
            if present != {**present, **facts}:
                write_json(self._directory.path / UPKEEP_FILE, {**contents, part: {**present, **facts}})

    def succeeded(self, part: str) -> None:
        """The part has done its work. Raises as `note`."""
        if part in self._failing:
            self._failing.discard(part)
            logger.info("%s works again", part)
        self.note(part, {"succeeded": _now(), "problem": None, "since": None})

    def failed(self, part: str, problem: str) -> None:
        """The part could not do its work; it will try again. Raises LeaseLost as `note`."""
        try:
            since = self.facts(part).get("since") or _now()
            self.note(part, {"problem": problem, "since": since})
        except CheckpointError as error:  # a disk that is full, say
            logger.debug("%s was not written: %s", UPKEEP_FILE, error)
        if part not in self._failing:
            self._failing.add(part)
            logger.warning("%s of run %s failed, training goes on: %s", part, self._directory.run_id, problem)


def read_upkeep(log_path: Path) -> dict[str, dict[str, Any]]:
    """Part -> "succeeded", "problem" and "since" (UTC, ISO 8601), "note", ...; {} when there is nothing.

    A file that is damaged is nothing: it holds no state of the run.
    """
    try:
        contents = read_json(log_path / UPKEEP_FILE) or {}
    except CheckpointError as error:
        logger.warning("%s", error)
        return {}
    return {part: values for part, values in contents.items() if isinstance(values, dict)}


def upkeep_text(contents: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What upkeep.json says, for people: (part, how it stands)."""
    return [(part, _told(values)) for part, values in sorted(contents.items()) if isinstance(values, dict)]


def _told(values: Mapping[str, Any]) -> str:
    last = values.get("succeeded")
    done = f"last done {last}" if last else "not done yet"
    if values.get("commit"):
        done += f", with checkpoint {values['commit']}"
    if values.get("problem"):
        return f"FAILING since {values.get('since')}: {values['problem']} ({done})"
    return str(values.get("note") or done)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
