"""The application: which path is answered by whom, and what happens at its start and its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cookbook.backend.control_plane import (
    answers,
    checkpoints,
    deployments,
    inference,
    jobs,
    models,
    promotion,
    shapes,
    status,
)
from cookbook.backend.control_plane.auth import Activity, Gate
from cookbook.backend.control_plane.context import ACCOUNT, Plane
from cookbook.backend.control_plane.hot_load import to_hot_load
from cookbook.backend.control_plane.lifecycle import Lifecycle
from cookbook.backend.control_plane.promotion import Promotions
from cookbook.backend.control_plane.proxy import PROXY_TIMEOUT, Proxy, to_trainer
from cookbook.backend.control_plane.store import LIVE_STATES, Kind, Store
from cookbook.backend.paths import BackendPaths
from cookbook.backend.snapshots import remove_deleted, remove_leftovers

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

_IDLE_CHECK_S = 1.0
_ACCOUNT = "/v1/accounts/{account}"
_JOBS = f"{_ACCOUNT}/rlorTrainerJobs"
_DEPLOYMENTS = f"{_ACCOUNT}/deployments"
_SHAPE_VERSIONS = f"{_ACCOUNT}/trainingShapes/{{shape}}/versions"
_DEPLOYMENT_SHAPE = f"{_ACCOUNT}/deploymentShapes/{{shape}}"


def build_app(paths: BackendPaths, *, token: str, idle_timeout_s: float, stop: Callable[[], None]) -> Starlette:
    """The control plane of one home and version. `stop` is called when it is told to end or has been idle."""
    activity = Activity()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        store = Store(paths.store)
        # trust_env: a proxy for the web must not see what goes to our own workers.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=PROXY_TIMEOUT, limits=limits) as client:
            plane = Plane(
                paths=paths,
                store=store,
                trainers=Lifecycle(
                    Kind.TRAINER, paths.job_dir, store, client, token, partial(_remove_half_written, paths)
                ),
                deployments=Lifecycle(Kind.DEPLOYMENT, paths.deployment_dir, store, client, token),
                promotions=Promotions(paths, store),
                proxy=Proxy(client, token),
                stop=stop,
                started=time.time(),
            )
            app.state.plane = plane
            plane.trainers.reattach()
            plane.deployments.reattach()
            plane.promotions.restart_unfinished()
            idle_watch = asyncio.create_task(_stop_when_idle(plane, activity, idle_timeout_s))
            yield
            idle_watch.cancel()
            stopped = "the embedded backend was stopped"
            await asyncio.gather(plane.trainers.stop_all(stopped), plane.deployments.stop_all(stopped))
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


def _remove_half_written(paths: BackendPaths, job_id: str) -> None:
    remove_leftovers(paths.checkpoints, job_id)
    remove_deleted(paths.checkpoints, job_id)


async def _list_accounts(_request: Request) -> Response:
    """GET accounts: exactly one, which is what the SDK insists on."""
    return answers.JsonAnswer({"accounts": [{"name": f"accounts/{ACCOUNT}"}]})


class _ToWorker:
    """Hands a request to the proxy. A class, because Starlette expects a function to return a response."""

    def __init__(self, forward: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._forward = forward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._forward(scope, receive, send)


def _routes() -> list[Route]:
    """First match wins: the methods of a resource (`{job}:resume`) stand before the resource (`{job}`)."""
    get, post, patch, delete = ["GET"], ["POST"], ["PATCH"], ["DELETE"]
    return [
        Route("/cookbook/v1/status", status.get_status, methods=get),
        Route("/cookbook/v1/stop", status.post_stop, methods=post),
        Route("/training/v1/rlorTrainerJobs/{account}/{job}/{path:path}", _ToWorker(to_trainer)),
        Route("/v1/accounts", _list_accounts, methods=get),
        Route(_JOBS, jobs.create_job, methods=post),
        Route(_JOBS, jobs.list_jobs, methods=get),
        Route(f"{_JOBS}/{{job}}:resume", jobs.resume_job, methods=post),
        Route(f"{_JOBS}/{{job}}:cancel", jobs.cancel_job, methods=post),
        Route(f"{_JOBS}/{{job}}/checkpoints", checkpoints.list_checkpoints, methods=get),
        Route(f"{_JOBS}/{{job}}/checkpoints/{{checkpoint}}", checkpoints.delete_checkpoint, methods=delete),
        Route(f"{_JOBS}/{{job}}", jobs.get_job, methods=get),
        Route(f"{_JOBS}/{{job}}", jobs.delete_job, methods=delete),
        Route(_SHAPE_VERSIONS, shapes.list_shape_versions, methods=get),
        Route(f"{_SHAPE_VERSIONS}/{{version}}", shapes.get_shape_version, methods=get),
        Route("/inference/v1/completions", _ToWorker(inference.to_deployment), methods=post),
        Route("/inference/v1/chat/completions", _ToWorker(inference.to_deployment), methods=post),
        Route("/inference/v1/models", inference.list_served, methods=get),
        Route("/hot_load/v1/models/hot_load", _ToWorker(to_hot_load), methods=get + post),
        Route(_DEPLOYMENTS, deployments.create_deployment, methods=post),
        Route(_DEPLOYMENTS, deployments.list_deployments, methods=get),
        Route(f"{_DEPLOYMENTS}/{{deployment}}", deployments.get_deployment, methods=get),
        Route(f"{_DEPLOYMENTS}/{{deployment}}", deployments.update_deployment, methods=patch),
        Route(f"{_DEPLOYMENTS}/{{deployment}}", deployments.delete_deployment, methods=delete),
        Route(f"{_DEPLOYMENT_SHAPE}/versions", shapes.list_deployment_shape_versions, methods=get),
        Route(f"{_DEPLOYMENT_SHAPE}/versions/{{version}}", shapes.get_deployment_shape_version, methods=get),
        Route(_DEPLOYMENT_SHAPE, shapes.get_deployment_shape, methods=get),
        Route(f"{_ACCOUNT}/checkpoints/{{checkpoint}}:promote", promotion.promote_checkpoint, methods=post),
        Route(f"{_ACCOUNT}/operations/{{operation}}", promotion.get_operation, methods=get),
        Route(f"{_ACCOUNT}/models", models.list_models, methods=get),
        Route(f"{_ACCOUNT}/models/{{model}}", models.get_model, methods=get),
    ]
