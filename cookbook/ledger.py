"""The resources of a run, in resources.jsonl: written down before they are created, so that none can be leaked."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from cookbook.errors import CheckpointError, LeaseLost
from cookbook.files import append_jsonl, read_jsonl
from cookbook.run import RESOURCES_FILE, RunDirectory

__all__ = ["ResourceLedger", "ResourceRecord", "read_resources"]


@dataclass(frozen=True)
class ResourceRecord:
    """A trainer or deployment that a run asked for. The id is written before the resource is created."""

    resource_id: str
    kind: str
    """"trainer" or "deployment"."""
    role: str
    """What it is to the run: "policy", "reference", ..."""
    generation: int
    """1, 2, ...: a dead or deleted id is never used again, the next generation is."""
    state: str
    """"intended" (may exist), "confirmed" (was created), "freed" (was deleted)."""
    spec: str
    """Fingerprint of what was asked for; another one needs another resource."""
    time: str = field(default="", compare=False)
    """When this was written, UTC, ISO 8601; "" while it is not."""


class ResourceLedger:
    """The resources of an open run, in resources.jsonl."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._closed = threading.Event()

    def close(self) -> None:
        """Have nothing made any more, by whichever thread still provisions: `intend` and `check_lease` raise LeaseLost.

        To be done before the resources are freed. What was made can still be written down.
        """
        self._closed.set()

    def intend(
        self, kind: str, role: str, generation: int, spec: str = "", *, resource_id: str | None = None
    ) -> ResourceRecord:
        """Write down a resource that is about to be created; its id is `{run id}-{role}-g{generation}` if not given."""
        self._check_open()
        name = resource_id or f"{self._run.run_id}-{role}-g{generation}"
        return self._append(ResourceRecord(name, kind, role, generation, state="intended", spec=spec))

    def confirm(self, record: ResourceRecord) -> ResourceRecord:
        """Write down that a resource was created."""
        return self._append(replace(record, state="confirmed"))

    def freed(self, record: ResourceRecord) -> ResourceRecord:
        """Write down that a resource was deleted."""
        return self._append(replace(record, state="freed"))

    def current(self, role: str) -> ResourceRecord | None:
        """The newest generation of a role, freed or not; None when there was none."""
        return max((r for r in self.all() if r.role == role), key=lambda r: r.generation, default=None)

    def check_lease(self) -> None:
        """Check that this process still owns the run.

        Raises:
            LeaseLost: it does not; the run's resources are another's. Or they are being freed.
        """
        self._check_open()
        self._run.check_lease()

    def all(self) -> list[ResourceRecord]:
        """Every resource the run ever asked for, in its latest state."""
        return read_resources(self._run.path)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise LeaseLost(f"{self._run.run_id} is ending, and its resources are being freed; nothing more is made.")

    def _append(self, record: ResourceRecord) -> ResourceRecord:
        with self._run.guard():
            append_jsonl(
                self._run.path / RESOURCES_FILE,
                {**asdict(record), "time": datetime.now(UTC).isoformat(timespec="seconds")},
            )
        return record


def read_resources(log_path: Path) -> list[ResourceRecord]:
    """The resources of a run, in their latest state, without owning it.

    Raises:
        CheckpointError: resources.jsonl is damaged.
    """
    names = [entry.name for entry in fields(ResourceRecord)]
    latest: dict[str, ResourceRecord] = {}
    for number, row in enumerate(read_jsonl(log_path / RESOURCES_FILE), start=1):
        missing = [name for name in names if name not in row]
        if missing:
            raise CheckpointError(f"{log_path / RESOURCES_FILE}, row {number} lacks {missing}: {row!r:.200}")
        latest[row["resource_id"]] = ResourceRecord(**{name: row[name] for name in names})
    return list(latest.values())
