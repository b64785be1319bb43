"""What the launcher asks of a backend: its version and how it fares, and that it end."""

from __future__ import annotations

import os
import time
from collections import Counter

from starlette.requests import Request
from starlette.responses import Response

from cookbook.backend.control_plane.answers import JsonAnswer
from cookbook.backend.control_plane.context import Plane, plane_of
from cookbook.backend.control_plane.store import Kind

__all__ = ["get_status", "post_stop"]


async def get_status(request: Request) -> Response:
    """GET /cookbook/v1/status: the version handshake. `jobs` and `deployments` are counted by state."""
    plane = plane_of(request)
    return JsonAnswer(
        {
            "version": plane.paths.version,
            "pid": os.getpid(),
            "uptime_s": time.time() - plane.started,
            "jobs": _states(plane, Kind.TRAINER),
            "deployments": _states(plane, Kind.DEPLOYMENT),
        }
    )


def _states(plane: Plane, kind: str) -> dict[str, int]:
    return dict(Counter(job.state.removeprefix("JOB_STATE_").lower() for job in plane.store.jobs(kind=kind)))


async def post_stop(request: Request) -> Response:
    """POST /cookbook/v1/stop: end all workers, the control plane and its supervisor; answered at once."""
    plane_of(request).stop()
    return JsonAnswer({"stopping": True})
