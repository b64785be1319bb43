"""The config of the janitor flow: how long it waits before it frees something or retries a run, and how often."""

from __future__ import annotations

from pydantic import Field

from cookbook.config import Config

__all__ = ["JanitorConfig"]


class JanitorConfig(Config):
    """Freeing what no live run owns, and retrying flow runs whose process has died."""

    dry_run: bool = Field(False, description="Only say what would be done.")
    grace_s: float = Field(
        300, ge=0, description="Seconds for which a trainer or deployment that was just asked for is left alone."
    )
    retry_dead_runs: bool = Field(
        True,
        description="Retry flow runs whose process has died. They must come from a deployment, so that a worker takes "
        "them up.",
    )
    max_retries: int = Field(
        3, ge=0, description="How often in a row, without a further commit, a flow run is retried. Then it is left."
    )
    settle_s: float = Field(
        30,
        ge=0,
        description="Seconds after which a flow run that looks dead is looked at again before it is retried: Prefect "
        "reports one death up to twice, seconds apart, and the later report undoes a retry.",
    )
    pending_s: float = Field(
        600,
        ge=0,
        description="Seconds after which a flow run that a worker has taken up but not started, or that its own "
        "process was to retry, counts as dead. Longer than a start takes.",
    )
    cancel_s: float = Field(
        60,
        gt=0,
        description="Seconds after which a flow run that was cancelled, and that its worker has not ended, is told to "
        "stop, and within which it then has to.",
    )
    crashed_within_h: float = Field(
        24, gt=0, description="Hours: a flow run that crashed longer ago is left alone; somebody has decided about it."
    )
