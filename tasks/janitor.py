"""Freeing what no live run owns, on each backend, and the janitor's report. What is freed: cookbook/janitor.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from cookbook.config import environment
from cookbook.control_plane import connect
from cookbook.errors import CookbookError
from cookbook.janitor import SweepReport, backends_to_sweep, sweep
from cookbook.janitor_config import JanitorConfig
from tasks.page import page_log
from tasks.run import api_key
from tasks.supervision import Suspect

__all__ = ["free_leftovers", "report_of"]


@task(cache_policy=NO_CACHE)
def free_leftovers(config: JanitorConfig) -> list[SweepReport]:
    """Free what no live run of this home owns, on each backend where there may be something.

    A backend that cannot be asked is a problem in its report, and does not stop the others.
    """
    env = environment()
    key = api_key("fireworks", env)
    reports = []
    for backend in backends_to_sweep(env.home, has_key=key is not None):
        try:
            with connect(backend, env, key if backend == "fireworks" else None) as control:
                reports.append(sweep(env.home, control, grace_s=config.grace_s, dry_run=config.dry_run))
        except CookbookError as error:
            page_log().warning("backend %s was not swept: %s", backend, error)
            reports.append(SweepReport(backend, (), problems=(str(error),)))
    return reports


def report_of(swept: Sequence[SweepReport], dead: Sequence[Suspect]) -> str:
    """The janitor's report, in Markdown."""
    parts = ["# Janitor"]
    for report in swept:
        parts += [f"## Backend {report.backend}", _table(report.rows()) or "Nothing of this home's runs is there."]
        parts += [f"- {problem}" for problem in report.problems]
        parts += [f"- The record of {session}, which was killed, is removed." for session in report.sessions]
        if report.foreign:
            parts.append(f"{report.foreign} more that no run of this home has asked for; left alone.")
    if not swept:
        parts.append("No backend has anything of this home's runs.")
    parts += ["## Flow runs without a process", _table([suspect.row() for suspect in dead]) or "None."]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
