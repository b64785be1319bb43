"""The state of a deployment: read, and waited for."""

from __future__ import annotations

import time

from cookbook.control_plane import ControlPlane, Deployment
from cookbook.deadlines import Deadline
from cookbook.errors import ProvisioningError

__all__ = ["DELETED", "FAILED", "is_lost", "is_scaled_to_zero", "status_of", "wait_until_ready"]

FAILED = "FAILED"
DELETED = ("DELETING", "DELETED")

_READY = "READY"
_STARTING = ("CREATING", "UPDATING")
_GONE: Deployment = {"state": "DELETED", "statusMessage": "there is no such deployment"}
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_STATE_TIMEOUT_S = 10.0


def wait_until_ready(control: ControlPlane, deployment_id: str, deadline: Deadline, *, probed: bool) -> Deployment:
    """Poll until the deployment serves, or cannot any more.

    Its state may lag behind: a new one may answer before it is READY, and one that was there before may have died a
    moment ago. A completion tells; one that is `probed` must give one, whatever its state says.

    Raises:
        ProvisioningError: the deadline has passed.
    """
    model = f"accounts/{control.account_id(max(1.0, deadline.remaining()))}/deployments/{deployment_id}"
    pause = _FIRST_PAUSE_S
    while True:
        deployment = control.deployment(deployment_id, max(1.0, deadline.remaining())) or _GONE
        state = deployment["state"]
        if state in (FAILED, *DELETED) or (state == _READY and not probed):
            return deployment
        if state in (_READY, *_STARTING) and control.is_serving(model):
            return deployment
        if deadline.expired:
            raise ProvisioningError(
                f"deployment {deployment_id} was not ready within deployment.deployment_timeout_s="
                f"{deadline.seconds:g} s: it is {state} ({status_of(deployment)}). Raise "
                "deployment.deployment_timeout_s, or start the run again to wait on."
            )
        time.sleep(min(pause, deadline.remaining()))
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)


def is_lost(control: ControlPlane, deployment_id: str) -> bool:
    """Whether a deployment is gone or has failed, so that no further request can help; False when nobody can tell."""
    try:
        found = control.deployment(deployment_id, _STATE_TIMEOUT_S)
    except ProvisioningError:
        return False
    return found is None or found["state"] in (FAILED, *DELETED)


def is_scaled_to_zero(deployment: Deployment) -> bool:
    """Whether it is to have no replica at all."""
    return deployment.get("maxReplicaCount") == 0


def status_of(deployment: Deployment) -> str:
    """The backend's own words about a deployment."""
    status = deployment.get("status")
    detail = status.get("message") if isinstance(status, dict) else status
    return str(deployment.get("statusMessage") or detail or "the backend gives no reason")
