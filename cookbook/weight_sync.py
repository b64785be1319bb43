"""Getting the policy's weights into the deployment, and the proof that it serves them.

The SDK's WeightSyncer does the work. Here are the deadline of each state, the names that are never used twice, and what
a failure leaves behind. When a sync is due is decided by the flow.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self, cast

from fireworks.training.sdk import WeightSyncer

from cookbook.client import ReconnectableClient
from cookbook.config import WeightSyncConfig
from cookbook.control_plane import ControlPlane, insist, problem_of
from cookbook.deadlines import Deadline
from cookbook.deployment_state import is_lost
from cookbook.deployments import DeploymentHandle, attach_trainer
from cookbook.errors import DeploymentLost, RequestRejected, WeightSyncError
from cookbook.provisioning import TrainerHandle

if TYPE_CHECKING:
    from types import TracebackType

    from fireworks.training.sdk import FiretitanTrainingClient

__all__ = ["SyncResult", "SyncState", "WeightSync"]

_STATUS_TIMEOUT_S = 30.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0

logger = logging.getLogger(__name__)


class SyncState(StrEnum):
    """Where a weight sync is."""

    NEW = "new"
    """Nothing was synced yet."""
    SAVING = "saving"
    """The trainer writes a sampler snapshot."""
    LOADING = "loading"
    """The deployment hot loads it, after the sequences in flight."""
    VERIFYING = "verifying"
    """The deployment is asked what it serves."""
    SERVING = "serving"
    """It serves the snapshot."""
    FAILED = "failed"
    """The last sync failed; the deployment may serve either."""


@dataclass(frozen=True)
class SyncResult:
    """One weight sync that was proved."""

    version: str
    """Full name of the snapshot that is now served."""
    save_s: float
    load_s: float
    verify_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.save_s + self.load_s + self.verify_s


@dataclass(frozen=True)
class _Saved:
    """What the SDK's syncer reads of a save."""

    snapshot_name: str
    checkpoint_type: str | None


class _PolicyClient:
    """Our client as the SDK's WeightSyncer wants it. A name that was saved is not saved again, so that saving and
    loading can each have a deadline of their own."""

    def __init__(self, client: ReconnectableClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._saved: dict[str, _Saved] = {}
        self.error: Exception | None = None
        """What the last save raised; the SDK only logs it."""

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str | None = None) -> _Saved:
        if name not in self._saved:
            try:
                snapshot = self._client.save_weights_for_sampler_ext(name, checkpoint_type, timeout_s=self._timeout_s)
            except Exception as error:
                self.error = error
                raise
            self._saved = {name: _Saved(snapshot, checkpoint_type)}
        return self._saved[name]


class WeightSync:
    """Brings the weights of one client's model into one deployment, again and again.

    Each sync goes through SAVING, LOADING, VERIFYING and ends in SERVING, or in FAILED with an error. After a failure,
    and after the client has reconnected, the next one is whole: no delta builds on what nobody vouches for.

    For use from one thread at a time.

    >>> syncs = WeightSync(control, deployment, trainer, client, config.weight_sync)  # doctest: +SKIP
    >>> syncs.sync("step-12", first=False).version  # doctest: +SKIP
    'step-12-1-a1b2c3d4'
    """

    def __init__(
        self,
        control: ControlPlane,
        deployment: DeploymentHandle,
        trainer: TrainerHandle,
        client: ReconnectableClient,
        config: WeightSyncConfig,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            deployment: where the weights go.
            trainer: whose job the snapshots are saved in; the deployment is attached to it before the first load.
            client: its model is saved.
            check_owner: raises where the deployment is another process's to load into; asked right before each load.
            config: `dcp_timeout` bounds a save; `weight_sync_timeout` the rest of a sync; `first_checkpoint_type`.
        """
        self.deployment = deployment
        self.state = SyncState.NEW
        self._control = control
        self._trainer = trainer
        self._client = client
        self._config = config
        self._check_owner = check_owner
        self._policy = _PolicyClient(client, float(config.dcp_timeout))
        self._attempts: Counter[str] = Counter()
        self._version = ""
        self._saved: list[str] = []
        self._needs_whole = False
        self._is_attached = False
        self._num_sessions = client.num_sessions
        self._syncer = self._new_syncer()

    @property
    def version(self) -> str:
        """The snapshot that the deployment was last proved to serve; "" = the base model, or never asked."""
        return self._version

    @property
    def job_id(self) -> str:
        """The trainer job that the snapshots are saved in."""
        return self._trainer.job_id

    def owns(self, name: str) -> bool:
        """Whether a snapshot was, or may this moment be, saved here. From any thread."""
        latest = {f"{base}-{attempt}" for base, attempt in dict(self._attempts).items()}
        return name in self._saved or name.rpartition("-")[0] in latest

    def needless(self) -> list[str]:
        """Snapshots saved here that nothing will load any more, oldest first: all but the newest two and the one that
        the deployment was last proved to serve. From any thread."""
        return [name for name in self._saved[:-2] if name != self._version]

    def forget(self, name: str) -> None:
        """A needless snapshot is gone."""
        self._saved.remove(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A call that was given up can do nothing more."""
        self._manager.close()

    def sync(self, name: str, *, first: bool) -> SyncResult:
        """Save the model's weights, load them into the deployment, and prove that it serves them.

        Args:
            name: of the snapshot, a DNS label of at most 40 characters. The attempt and the session are appended.
            first: the first sync of a start of the run: its type is `first_checkpoint_type`, and the deployment is
                warmed up with one request. Later ones of a full-parameter model are deltas.

        Raises:
            WeightSyncError: the trainer refused to save, or the deployment failed, was late, or serves something else.
                Names state, seconds and snapshot. Doing it again is safe.
            DeploymentLost: the deployment has failed, or was deleted.
            TrainerLost: the trainer's session is gone.
            whatever `check_owner` raises.
        """
        self._attempts[name] += 1
        attempt = f"{name}-{self._attempts[name]}"
        try:
            saved, save_s = self._save(attempt, first)
            deadline = Deadline(float(self._config.weight_sync_timeout))
            load_s = self._load(attempt, saved, deadline, first)
            verify_s = self._verify(saved.snapshot_name, deadline)
        except BaseException:  # an interrupt too: the load may be under way
            self._abandon()
            raise
        self._needs_whole = False
        self._version, self.state = saved.snapshot_name, SyncState.SERVING
        return SyncResult(saved.snapshot_name, save_s, load_s, verify_s)

    def serving(self) -> str:
        """Ask the deployment for the snapshot it serves; "" = the base model. Also kept as `version`.

        Raises:
            WeightSyncError: it does not answer, or its replicas serve different ones.
        """
        try:
            replicas = self._replicas(_STATUS_TIMEOUT_S)
        except Exception as error:
            what = f"{self._which()} cannot be asked what it serves: {problem_of(error)}"
            raise WeightSyncError(self._clean(what)) from None
        served = {str(replica.get("current_snapshot_identity") or "") for replica in replicas}
        if len(served) != 1:
            found = ", ".join(sorted(repr(version) for version in served)) or "none"
            raise WeightSyncError(f"{len(replicas)} replicas of {self._which()} serve different snapshots: {found}.")
        self._version = served.pop()
        return self._version

    # -- the states ----------------------------------------------------------------------------------------------------

    def _save(self, attempt: str, first: bool) -> tuple[_Saved, float]:
        self.state = SyncState.SAVING
        started = time.monotonic()
        is_broken = self._needs_whole or self._client.num_sessions != self._num_sessions
        if first or is_broken:
            self._syncer.reset_delta_chain()
        self._num_sessions = self._client.num_sessions
        self._needs_whole = True  # until this sync was proved
        self._policy.error = None
        name = self._syncer.save_only(attempt, "base" if is_broken and not first else None)
        seconds = time.monotonic() - started
        error = self._policy.error
        if isinstance(error, RequestRejected):
            raise self._error(seconds, attempt, f"{error}")
        if error is not None:
            raise error
        assert name is not None, "save_only names a snapshot that was saved"
        self._saved.append(name)
        return self._policy.save_weights_for_sampler_ext(attempt), seconds

    def _load(self, attempt: str, saved: _Saved, deadline: Deadline, first: bool) -> float:
        self.state = SyncState.LOADING
        started = time.monotonic()
        syncer = self._syncer
        syncer.warmup_after_hotload = first
        self._check_owner()
        try:
            if not self._is_attached:
                attach_trainer(self._control, self.deployment, self._trainer.job_name, deadline)
                self._is_attached = True
            insist(lambda: syncer.save_and_hotload(attempt, saved.checkpoint_type), deadline)
        except TimeoutError:
            problem = f"not done within weight_sync.weight_sync_timeout={deadline.seconds:g} s"
        except Exception as error:
            problem = _short(problem_of(error))
        else:
            return time.monotonic() - started
        failure = self._error(time.monotonic() - started, saved.snapshot_name, f"{problem}{self._words()}")
        raise DeploymentLost(f"{failure}") if is_lost(self._control, self.deployment.deployment_id) else failure

    def _verify(self, snapshot: str, deadline: Deadline) -> float:
        """Ask until every replica serves the snapshot: the SDK looks at the first one only."""
        self.state = SyncState.VERIFYING
        started = time.monotonic()
        pause = _FIRST_PAUSE_S
        while True:
            try:
                replicas = self._replicas(min(_STATUS_TIMEOUT_S, max(1.0, deadline.remaining())))
            except TimeoutError:
                problem = "it does not say what it serves"
            except Exception as error:
                problem = problem_of(error)
            else:
                if replicas and all(_serves(replica, snapshot) for replica in replicas):
                    return time.monotonic() - started
                served = ", ".join(sorted({str(replica.get("current_snapshot_identity")) for replica in replicas}))
                problem = f"its {len(replicas)} replicas serve {served or 'nothing'}"
            if deadline.expired:
                raise self._error(time.monotonic() - started, snapshot, problem)
            time.sleep(min(pause, deadline.remaining()))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _new_syncer(self) -> WeightSyncer:
        self._manager = self._control.deployment_manager()
        return WeightSyncer(
            policy_client=cast("FiretitanTrainingClient", self._policy),
            deploy_mgr=self._manager,
            deployment_id=self.deployment.deployment_id,
            base_model=self.deployment.base_model,
            hotload_timeout=self._config.weight_sync_timeout,
            first_checkpoint_type=self._config.first_checkpoint_type,
            lora_rank=self._client.lora_rank,
        )

    def _abandon(self) -> None:
        """Give up the load under way. Its thread can send nothing more: not this snapshot, after the next one."""
        self.state = SyncState.FAILED
        self._manager.close()
        self._syncer = self._new_syncer()

    def _error(self, seconds: float, snapshot: str, problem: str) -> WeightSyncError:
        where = f"weight sync of snapshot {snapshot!r} to {self._which()} failed while {self.state}"
        return WeightSyncError(self._clean(f"{where} after {seconds:.1f} s: {problem}"))

    def _which(self) -> str:
        return f"deployment {self.deployment.deployment_id}"

    def _clean(self, text: str) -> str:
        return text.replace(self._manager.api_key, "[key]")

    def _replicas(self, timeout_s: float) -> list[dict[str, Any]]:
        manager = self._manager
        status = insist(
            lambda: manager.hotload_check_status(
                self.deployment.deployment_id, self.deployment.base_model, timeout=max(1, int(timeout_s))
            ),
            Deadline(timeout_s),
        )
        return list(status.get("replicas") or [])

    def _words(self) -> str:
        """What the deployment itself says about its load, if anything."""
        try:
            states = [replica.get("loading_state") for replica in self._replicas(5.0)]
        except Exception:
            return ""
        return f" The deployment says: {states}" if any(states) else ""


def _short(problem: str) -> str:
    """The SDK's many lines about an error without its links and its advice to agents."""
    lines = [line.strip() for line in problem.strip().splitlines()]
    causes = [line.removeprefix("Cause: ") for line in lines if line.startswith("Cause: ")]
    return ". ".join([lines[0].removeprefix("ERROR: "), *causes]) if causes else problem


def _serves(replica: dict[str, Any], snapshot: str) -> bool:
    adapters = replica.get("loaded_adapters") or []
    is_loaded = replica.get("current_snapshot_identity") == snapshot or any(
        adapter.get("identity") == snapshot and adapter.get("status") == "loaded" for adapter in adapters
    )
    return bool(replica.get("readiness")) and is_loaded
