"""The janitor as a Prefect flow: frees what no live run owns, and brings on runs whose worker has died."""

from __future__ import annotations

from prefect import flow

from cookbook.janitor_config import JanitorConfig
from tasks.cancelling import end_cancelled_runs
from tasks.janitor import free_leftovers, report_of
from tasks.page import show_report
from tasks.supervision import end_stale_janitors, find_dead_runs, retry_dead_runs

__all__ = ["janitor"]


@flow(name="janitor", flow_run_name="janitor")
def janitor(config: JanitorConfig = JanitorConfig()) -> str:  # noqa: B008 (frozen)
    """End what was cancelled, free what no live run owns, then retry the flow runs whose process has died.

    Scheduled every few minutes. It may be killed at any moment, and run twice: the next run finishes what is left.
    """
    end_stale_janitors()  # which would take this one's place
    cancelled = end_cancelled_runs(config)  # whose worker has not heard of it
    dead = find_dead_runs(config)  # running or crashed, says Prefect, and nobody owns their run directory
    swept = free_leftovers(config)  # a retried run finds its trainer again by its id, and resumes it
    dead = retry_dead_runs(config, dead)  # after a while, if they are still dead, and not for ever
    report = report_of(swept, cancelled + dead)
    show_report(report, key="janitor", description="What was found, and what was done")
    return report
