"""What is done beside training once something was saved: what is not needed any more is deleted, and the run directory
is mirrored.

Nothing here ends a run or keeps it waiting for long: what fails is logged once each time that it begins to fail, is
written to upkeep.json, and is tried again after the next commit. It may be killed at any moment. What is deleted is
decided in cookbook/retention.py, what is copied in cookbook/mirror.py.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from cookbook.checkpoints import CheckpointKind, read_checkpoints
from cookbook.deadlines import Deadline, call_with_deadline
from cookbook.errors import CheckpointError, LeaseLost
from cookbook.mirror import MIRROR, CopyCancelled, Mirror, mirrored_commits
from cookbook.mirror_url import without_credentials
from cookbook.retention import LiveSaves, RetentionPolicy, delete_snapshot, plan_prune, prune
from cookbook.rollouts.store import ROLLOUTS_FOLDER, RolloutStore
from cookbook.snapshots import SnapshotRef
from cookbook.upkeep_record import UpkeepRecord

if TYPE_CHECKING:
    from pathlib import Path

    from cookbook.config import StorageConfig
    from cookbook.control_plane import ControlPlane
    from cookbook.run import RunDirectory
    from cookbook.weight_sync import WeightSync

__all__ = ["RETENTION", "WEIGHT_SYNCS", "Background", "Upkeep"]

RETENTION = "retention"
WEIGHT_SYNCS = "weight syncs"
"""Parts of upkeep.json, as is MIRROR."""

RETENTION_TIMEOUT_S = 30.0
CHECK_TIMEOUT_S = 20.0
STALLED_S = 600.0
"""Seconds after which a copy that does not get on is reported."""

_NOTHING_DELETED = "nothing is deleted: the fireworks API has no call to delete checkpoints"
_STEP = re.compile(r"step-(\d+)-")

logger = logging.getLogger(__name__)


class Upkeep:
    """The upkeep of one start of a run. Nothing that it does raises."""

    def __init__(self, directory: RunDirectory, storage: StorageConfig, home: Path) -> None:
        """Nothing is looked at yet."""
        self._directory = directory
        self._storage = storage
        self._home = home
        self._record = UpkeepRecord(directory)
        self._deciding = threading.Lock()
        self._mirror = None if storage.mirror_url is None else Mirror(storage.mirror_url, directory, self._record)
        self._copying = Background("cookbook-mirror", self._push)
        self._syncs: tuple[ControlPlane, WeightSync] | None = None
        self.unusable: Collection[str] = ()
        """Checkpoints that this start could not load."""
        self._dropping = Background("cookbook-syncs", self._drop_syncs)

    def after_commit(self, control: ControlPlane, name: str, trainer_id: str, sync: WeightSync | None) -> None:
        """Delete what the commit `name` has made needless, then copy the run directory in the background.

        Takes a few requests to the backend, and at most about 30 s where it does not answer.

        Args:
            trainer_id: the trainer job that saves.
            sync: the weight syncs of this start, whose snapshots `after_sync` sees to.
        """
        if self._storage.keep_last is not None:
            self._try(RETENTION, lambda: self._retain(control, name, trainer_id, sync))
        self.copy()

    def after_sync(self, control: ControlPlane, sync: WeightSync) -> None:
        """Delete, in the background, the snapshots of weight syncs that nothing will load any more."""
        if self._storage.keep_last is not None and control.backend == "embedded" and self._needless(sync):
            self._syncs = (control, sync)
            self._dropping.start()

    def copy(self) -> None:
        """Mirror the run directory in the background; when a copy is under way, once more after it."""
        if self._mirror is None:
            return
        if self._copying.is_busy and time.monotonic() - self._mirror.active_at > STALLED_S:
            self._fail(MIRROR, f"the copy to {self._mirror.url} has not got on for {STALLED_S:.0f} s")
        self._copying.start()

    def mirror_conflict(self) -> str | None:
        """Why the run may not be mirrored where the config says: it would go over another run. None when it may, and
        when the mirror cannot be asked, which is reported as any failed copy. Takes at most 20 s."""
        mirror = self._mirror
        if mirror is None:
            return None
        found: list[str | None] = []
        self._try(MIRROR, lambda: found.append(call_with_deadline(mirror.conflict, CHECK_TIMEOUT_S)), is_news=False)
        return found[0] if found else None

    def give_up(self) -> None:
        """Leave off copying: the next start of the run does it."""
        if self._mirror is not None:
            self._mirror.cancel()

    def finish(self, timeout_s: float) -> None:
        """Wait for what is under way, and mirror the run directory as it is at its end. Nothing is done after that.

        Args:
            timeout_s: a copy that takes longer is given up; the whole one before it counts.
        """
        deadline = Deadline(timeout_s)
        if self._mirror is not None:
            self._copying.start()
            if not self._copying.wait(deadline.remaining()):
                self._mirror.cancel()
                self._fail(MIRROR, f"the last copy to {self._mirror.url} was given up after {timeout_s:.0f} s")
        self._dropping.wait(deadline.remaining())

    # -- retention -----------------------------------------------------------------------------------------------------

    def _retain(self, control: ControlPlane, name: str, trainer_id: str, sync: WeightSync | None) -> None:
        if control.backend != "embedded":
            self._say_once(RETENTION, _NOTHING_DELETED)
        else:
            self._prune(control, name, trainer_id, sync)
        self._prune_rollouts()

    def _prune(self, control: ControlPlane, name: str, trainer_id: str, sync: WeightSync | None) -> None:
        deadline = Deadline(RETENTION_TIMEOUT_S)
        assert self._storage.keep_last is not None, "nothing is deleted without it"
        policy = RetentionPolicy(self._storage.keep_last, self._storage.keep_every)
        live = LiveSaves(name, trainer_id, is_sync=sync.owns if sync else lambda _: False, unusable=self.unusable)
        with self._deciding:
            keep = self._relied_on() | ({sync.version} if sync is not None else set())
            path = self._directory.path
            plan = plan_prune(control, path, policy, home=self._home, keep=keep, live=live, deadline=deadline)
            result = prune(control, self._directory, plan, deadline=deadline)
        if result.rows:
            logger.info("deleted %s, %.3f GB", ", ".join(result.rows), result.freed_bytes / 1e9)

    def _relied_on(self) -> set[str]:
        """Checkpoints that the mirror, or the copy under way, goes on from."""
        if self._mirror is None:
            return set()
        return mirrored_commits(self._directory.path) | self._mirror.relied_on

    def _prune_rollouts(self) -> None:
        """What was sampled before the oldest commit: no restore trains it again."""
        steps = [row.step for row in read_checkpoints(self._directory.path) if row.state_path]
        if steps:
            with self._directory.guard():
                RolloutStore(self._directory.path / ROLLOUTS_FOLDER).prune(min(steps))

    def _needless(self, sync: WeightSync) -> list[str]:
        every = self._storage.keep_every
        steps = {name: _STEP.match(name) for name in sync.needless()}
        return [name for name, step in steps.items() if not (every and step and int(step[1]) % every == 0)]

    def _drop_syncs(self) -> None:
        assert self._syncs is not None, "set before it is asked for"
        control, sync = self._syncs
        self._try(WEIGHT_SYNCS, lambda: self._delete_needless(control, sync), is_news=False)

    def _delete_needless(self, control: ControlPlane, sync: WeightSync) -> None:
        with self._directory.guard():
            pass
        deadline = Deadline(RETENTION_TIMEOUT_S)
        for name in self._needless(sync):
            refusal = delete_snapshot(control, SnapshotRef(sync.job_id, CheckpointKind.SAMPLER, name), deadline)
            if refusal is None:
                sync.forget(name)
            else:
                logger.debug("snapshot %s stays for now: %s", name, refusal)

    # -- mirror --------------------------------------------------------------------------------------------------------

    def _push(self) -> None:
        mirror = self._mirror
        assert mirror is not None, "asked for only with a mirror"
        self._try(MIRROR, lambda: mirror.push(self._deciding))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _try(self, part: str, work: Callable[[], object], *, is_news: bool = True) -> None:
        """Do a part's work, and write down how it went; where it is no news, only that it failed, and works again."""
        try:
            work()
            if is_news or self._record.is_failing(part):
                self._record.succeeded(part)
        except LeaseLost as error:  # the main thread notices by itself, and stops
            logger.debug("%s stops: %s", part, error)
        except CopyCancelled:  # who cancels it says why: that stands
            logger.debug("%s was given up", part)
        except TimeoutError as error:
            self._fail(part, f"{error}" or "it did not answer in time")
        except Exception as error:  # the file system of a mirror may raise anything
            words = f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            self._fail(part, words)

    def _fail(self, part: str, problem: str) -> None:
        try:
            self._record.failed(part, without_credentials(problem))
        except LeaseLost as error:
            logger.debug("%s stops: %s", part, error)

    def _say_once(self, part: str, text: str) -> None:
        if self._record.facts(part).get("note") != text:
            logger.info("%s: %s", part, text)
            self._record.note(part, {"note": text})


class Background:
    """Does one thing in a thread, never twice at once. Asked while it is busy, it does it once more after that."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        """`work` must not raise."""
        self._name = name
        self._work = work
        self._lock = threading.Lock()
        self._is_wanted = False
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it is at it."""
        with self._lock:
            return self._thread is not None

    def start(self) -> None:
        """Begin; returns at once. The thread logs as the caller does, and ends with the process."""
        with self._lock:
            self._is_wanted = True
            if self._thread is None:
                run = contextvars.copy_context().run
                self._thread = threading.Thread(target=run, args=(self._go_on,), name=self._name, daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is wanted any more. False when that takes longer than `timeout_s`."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _go_on(self) -> None:
        while True:
            with self._lock:
                if not self._is_wanted:
                    self._thread = None
                    return
                self._is_wanted = False
            self._work()
