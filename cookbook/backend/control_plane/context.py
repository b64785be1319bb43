"""What the request handlers share: one Plane for the life of the process, and the only account there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from cookbook.backend.control_plane.answers import ApiError, Code
from cookbook.backend.paths import BackendPaths

if TYPE_CHECKING:  # these modules use this one
    from cookbook.backend.control_plane.lifecycle import Lifecycle
    from cookbook.backend.control_plane.promotion import Promotions
    from cookbook.backend.control_plane.proxy import Proxy
    from cookbook.backend.control_plane.store import Store

__all__ = ["ACCOUNT", "Plane", "plane_of", "require_account"]

ACCOUNT = "local"


@dataclass(frozen=True)
class Plane:
    """The parts of one running control plane. `stop` asks the server to end; `started` is in seconds since 1970."""

    paths: BackendPaths
    store: Store
    trainers: Lifecycle
    deployments: Lifecycle
    promotions: Promotions
    proxy: Proxy
    stop: Callable[[], None]
    started: float


def plane_of(request: Request) -> Plane:
    """The plane that serves a request.

    Raises:
        ApiError: the request's path names another account (404).
    """
    require_account(request.path_params.get("account", ACCOUNT))
    plane = request.app.state.plane
    assert isinstance(plane, Plane)
    return plane


def require_account(account: str) -> None:
    """ApiError (404) unless `account` is the one account of an embedded backend."""
    if account != ACCOUNT:
        raise ApiError(
            Code.NOT_FOUND, f"there is no account {account!r}; the embedded backend has one, accounts/{ACCOUNT}."
        )
