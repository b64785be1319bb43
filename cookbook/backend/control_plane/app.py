"""The application: which path is answered by whom, and what happens at its start and its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane import answers, checkpoints, jobs, models, promotion, shapes, status
from cookbook.backend.control_plane.auth import Activity, Gate
from cookbook.backend.control_plane.context import ACCOUNT, Plane
from cookbook.backend.control_plane.lifecycle import Lifecycle
from cookbook.backend.control_plane.promotion import Promotions
from cookbook.backend.control_plane.proxy import PROXY_TIMEOUT, Proxy
from cookbook.backend.control_plane.store import LIVE_STATES, Store
from cookbook.backend.paths import BackendPaths

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

_IDLE_CHECK_S = 1.0
_ACCOUNT = "/v1/accounts/{account}"
_JOBS = f"{_ACCOUNT}/rlorTrainerJobs"
_SHAPE_VERSIONS = f"{_ACCOUNT}/trainingShapes/{{shape}}/versions"


def build_app(paths: BackendPaths, *, token: str, idle_timeout_s: float, stop: Callable[[], None]) -> Starlette:
    """The control plane of one home and version. `stop` is called when it is told to end or has been idle."""
    activity = Activity()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        store = Store(paths.store)
        # trust_env: a proxy for the web must not see what goes to our own workers.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=PROXY_TIMEOUT, limits=limits) as client:
            lifecycle = Lifecycle(paths, store, client, token)
            plane = Plane(
                paths=paths,
                store=store,
                lifecycle=lifecycle,
                promotions=Promotions(paths, store),
                proxy=Proxy(store, lifecycle, client, token),
                stop=stop,
                started=time.time(),
            )
            app.state.plane = plane
            lifecycle.reattach()
            plane.promotions.restart_unfinished()
            idle_watch = asyncio.create_task(_stop_when_idle(plane, activity, idle_timeout_s))
            yield
            idle_watch.cancel()
            await lifecycle.stop_all("the embedded backend was stopped")
        store.close()

    return Starlette(
        routes=_routes(),
        middleware=[Middleware(Gate, token=token, activity=activity)],
        exception_handlers=answers.handlers,
        lifespan=lifespan,
    )


async def _stop_when_idle(plane: Plane, activity: Activity, idle_timeout_s: float) -> None:
    while True:
        await asyncio.sleep(min(_IDLE_CHECK_S, idle_timeout_s / 4))
        busy = plane.promotions.busy or bool(plane.store.jobs(LIVE_STATES))
        if not busy and activity.quiet_s() >= idle_timeout_s:
            logger.info("idle for %.0f s: ending", idle_timeout_s)
            plane.stop()
            return


async def _list_accounts(_request: Request) -> Response:
    """GET accounts: exactly one, which is what the SDK insists on."""
    return answers.JsonAnswer({"accounts": [{"name": f"accounts/{ACCOUNT}"}]})


class _ToWorker:
    """Hands a request to the proxy. A class, because Starlette expects a function to return a response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plane: Plane = scope["app"].state.plane
        await plane.proxy(scope, receive, send)


def _routes() -> list[Route]:
    """First match wins: the methods of a resource (`{job}:resume`) stand before the resource (`{job}`)."""
    get, post, delete = ["GET"], ["POST"], ["DELETE"]
    return [
        Route("/cookbook/v1/status", status.get_status, methods=get),
        Route("/cookbook/v1/stop", status.post_stop, methods=post),
        Route("/training/v1/rlorTrainerJobs/{account}/{job}/{path:path}", _ToWorker()),
        Route("/v1/accounts", _list_accounts, methods=get),
        Route(_JOBS, jobs.create_job, methods=post),
        Route(_JOBS, jobs.list_jobs, methods=get),
        Route(f"{_JOBS}/{{job}}:resume", jobs.resume_job, methods=post),
        Route(f"{_JOBS}/{{job}}:cancel", jobs.cancel_job, methods=post),
        Route(f"{_JOBS}/{{job}}/checkpoints", checkpoints.list_checkpoints, methods=get),
        Route(f"{_JOBS}/{{job}}", jobs.get_job, methods=get),
        Route(f"{_JOBS}/{{job}}", jobs.delete_job, methods=delete),
        Route(_SHAPE_VERSIONS, shapes.list_shape_versions, methods=get),
        Route(f"{_SHAPE_VERSIONS}/{{version}}", shapes.get_shape_version, methods=get),
        Route(f"{_ACCOUNT}/checkpoints/{{checkpoint}}:promote", promotion.promote_checkpoint, methods=post),
        Route(f"{_ACCOUNT}/operations/{{operation}}", promotion.get_operation, methods=get),
        Route(f"{_ACCOUNT}/models", models.list_models, methods=get),
        Route(f"{_ACCOUNT}/models/{{model}}", models.get_model, methods=get),
    ]
