"""The page of a flow run in the UI: its log and its artifacts. Without a flow run that Prefect knows there is no page;
then everything else works as it does with one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

__all__ = ["SHOWN", "has_page", "page_log", "show_report", "show_table"]

SHOWN = {"shown": True}
"""Marks a log record that the terminal shows otherwise: `cookbook run` leaves it out there."""

logger = logging.getLogger(__name__)


def has_page() -> bool:
    """Whether this is a flow run that Prefect knows."""
    return FlowRunContext.get() is not None


def page_log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The log of the page; without one, this module's."""
    return get_run_logger() if has_page() else logger


def show_report(markdown: str, *, key: str, description: str) -> None:
    """Show a text on the page, in place of the one that had this key."""
    if has_page():
        create_markdown_artifact(markdown, key=key, description=description)


def show_table(rows: Sequence[Mapping[str, Any]], *, key: str, description: str) -> None:
    """Show rows on the page, which all have the same keys."""
    if has_page():
        create_table_artifact([dict(row) for row in rows], key=key, description=description)
