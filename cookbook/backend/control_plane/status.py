"""What the launcher asks of a backend: its version and how it fares, and that it end."""

from __future__ import annotations

import os
import time
from collections import Counter

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import JsonAnswer
from cookbook.backend.control_plane.context import plane_of

__all__ = ["get_status", "post_stop"]


async def get_status(request: Request) -> Response:
    """GET /cookbook/v1/status: the version handshake. `jobs` counts trainer jobs by state."""
    plane = plane_of(request)
    states = Counter(job.state.removeprefix("JOB_STATE_").lower() for job in plane.store.jobs())
    return JsonAnswer(
        {
            "version": plane.paths.version,
            "pid": os.getpid(),
            "uptime_s": time.time() - plane.started,
            "jobs": dict(states),
        }
    )


async def post_stop(request: Request) -> Response:
    """POST /cookbook/v1/stop: end all workers, the control plane and its supervisor; answered at once."""
    plane_of(request).stop()
    return JsonAnswer({"stopping": True})
