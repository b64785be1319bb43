"""The page of a flow run in the UI: its log and its artifacts. Without a flow run that Prefect knows there is no page;
then everything else works as it does with one.

Artifacts are sent by a thread: while the server is gone, Prefect's client tries for a minute, and training must not
wait for that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect.artifacts import TableArtifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

__all__ = ["SHOWN", "Poster", "has_page", "page_id", "page_log", "post", "show_report", "show_table"]

SHOWN = {"shown": True}
"""Marks a log record that the terminal shows otherwise: `cookbook run` leaves it out there."""

REPORT_TIMEOUT_S = 10.0
"""Seconds that a report is waited for: the process may end after it."""

logger = logging.getLogger(__name__)


def has_page() -> bool:
    """Whether this is a flow run that Prefect knows."""
    return FlowRunContext.get() is not None


def page_id() -> str | None:
    """Id of the flow run; None without a page."""
    context = FlowRunContext.get()
    return None if context is None or context.flow_run is None else str(context.flow_run.id)


def page_log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The log of the page; without one, this module's."""
    return get_run_logger() if has_page() else logger


class Poster:
    """Sends things in a thread, one at a time, of each key only the newest. What fails is logged, and gone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, Callable[[], object]] = {}
        self._sending = False
        self._thread: threading.Thread | None = None

    def post(self, key: str, send: Callable[[], object]) -> None:
        """Have `send` called soon, in the present context; in place of what waits under the same key."""
        context = copy_context()
        with self._changed:
            self._waiting[key] = lambda: context.run(send)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="page", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self, timeout_s: float) -> bool:
        """Wait until all is sent; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._sending), timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._sending = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                key = next(iter(self._waiting))
                send = self._waiting.pop(key)
                self._sending = True
            try:
                send()
            except Exception as error:
                logger.warning("%s is not shown on the run's page: %s", key, error)


_poster = Poster()
post = _poster.post

_tables: dict[tuple[str | None, str], UUID] = {}
"""(Page, key) -> the table that is shown there."""


def show_report(markdown: str, *, key: str, description: str) -> None:
    """Show a text on the page, in place of the one that had this key, after all that was shown before."""
    if has_page():
        post(key, lambda: create_markdown_artifact(markdown, key=key, description=description))
        if not _poster.settle(REPORT_TIMEOUT_S):
            logger.warning("%s may be missing on the run's page: the Prefect server does not answer", key)


def show_table(rows: Sequence[Mapping[str, Any]], *, key: str, description: str) -> None:
    """Show rows on the page, which all have the same keys, in place of those that it showed under this key."""
    if has_page():
        table = [dict(row) for row in rows]
        post(key, lambda: _send_table(table, key, description))


def _send_table(table: list[dict[str, Any]], key: str, description: str) -> None:
    """In place: a version for each of the tables of a run of hours would fill the server's database."""
    shown = (page_id(), key)
    if shown not in _tables:
        _tables[shown] = create_table_artifact(table, key=key, description=description)  # type: ignore[assignment]
        return
    data = TableArtifact(table=table).format(_sync=True)  # type: ignore[call-arg]
    get_client(sync_client=True).update_artifact(_tables[shown], ArtifactUpdate(data=data))
