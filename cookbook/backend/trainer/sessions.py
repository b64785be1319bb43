"""Sessions and model ids: who may still be talked to. Fences off older epochs of a run and sessions gone silent.

Pure bookkeeping on the event loop's thread; weights, queues and HTTP are elsewhere.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

__all__ = ["SILENCE_S", "Gone", "NotFound", "Registry", "Session"]

SILENCE_S = 120.0
"""A session is closed after this many seconds without a heartbeat or another request that speaks of it."""

_ID = re.compile(r"(?:session|model)-([0-9a-f]{8})-\d+")


class NotFound(Exception):
    """An id that no trainer gave out."""


class Gone(Exception):
    """An id of a session or model that is closed, unloaded or fenced off, or that another process of this job had."""


@dataclass(frozen=True)
class Session:
    """`run` and `epoch` come from the client's metadata (`cookbook_run`, `cookbook_epoch`); None = not of a run."""

    session_id: str
    run: str | None
    epoch: int
    last_heard: float


class Registry:
    """Open sessions and models. Times are seconds on any one monotonic clock."""

    def __init__(self) -> None:
        # In every id, so that an id given out by an earlier process of this job is known to be gone.
        self._process = secrets.token_hex(4)
        self._count = 0
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, str] = {}
        self._unloaded: dict[str, str] = {}
        self._model_ids: dict[tuple[str, int], str] = {}
        self._newest_epoch: dict[str, int] = {}

    def open_session(self, metadata: Mapping[str, str], now: float) -> tuple[str, list[str]]:
        """A new session id, and the ids of the sessions that its epoch supersedes (to be closed by the caller).

        Raises:
            Gone: a session of the same run with a higher epoch was seen already.
            ValueError: the epoch is not a whole number.
        """
        run = metadata.get("cookbook_run")
        epoch = int(metadata.get("cookbook_epoch", "0"))
        superseded = []
        if run is not None:
            newest = self._newest_epoch.get(run, epoch)
            if epoch < newest:
                raise Gone(f"run {run} is owned by epoch {newest}, this session is of epoch {epoch}: stop this process")
            self._newest_epoch[run] = epoch
            superseded = [s.session_id for s in self._sessions.values() if s.run == run and s.epoch < epoch]
        session_id = self._new_id("session")
        self._sessions[session_id] = Session(session_id, run, epoch, now)
        return session_id, superseded

    def open_model(self, session_id: str, model_seq_id: int, now: float) -> str:
        """The id of the session's model number `model_seq_id`; the same one when it is asked for again."""
        self.heard(session_id, now)
        key = (session_id, model_seq_id)
        if key not in self._model_ids:
            self._model_ids[key] = self._new_id("model")
            self._models[self._model_ids[key]] = session_id
        return self._model_ids[key]

    def heard(self, session_id: str, now: float) -> None:
        """Note a sign of life. NotFound or Gone when there is no such session (any more)."""
        session = self._sessions.get(session_id)
        if session is None:
            self._refuse("session", session_id)
        self._sessions[session_id] = replace(session, last_heard=now)

    def heard_of_model(self, model_id: str, now: float) -> str:
        """Note a sign of life of a model's session and return the session's id. NotFound or Gone as in `heard`."""
        session_id = self._models.get(model_id)
        if session_id is None:
            self._refuse("model", model_id)
        self.heard(session_id, now)
        return session_id

    def unload_model(self, model_id: str, now: float) -> str:
        """Its id is gone from now on. The session's id, also when the call is repeated. NotFound or Gone as above."""
        if model_id in self._unloaded:
            session_id = self._unloaded[model_id]
            self.heard(session_id, now)
        else:
            session_id = self.heard_of_model(model_id, now)
            self._unloaded[model_id] = self._models.pop(model_id)
        return session_id

    def close_session(self, session_id: str) -> list[str]:
        """Its id and those of its models, which are returned, are gone from now on."""
        self._sessions.pop(session_id, None)
        models = [model_id for model_id, owner in self._models.items() if owner == session_id]
        for model_id in models:
            del self._models[model_id]
        return models

    def silent_sessions(self, now: float) -> list[str]:
        """Sessions that have not been heard of for too long."""
        return [s.session_id for s in self._sessions.values() if now - s.last_heard > SILENCE_S]

    def _new_id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._process}-{self._count}"

    def _refuse(self, kind: str, given: str) -> NoReturn:
        if _ID.fullmatch(given):
            raise Gone(f"{kind} {given} is closed, or its trainer process has ended: its weights are gone. Reconnect.")
        raise NotFound(f"there is no {kind} {given}")
