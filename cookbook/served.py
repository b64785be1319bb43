"""What a deployment serves at the moment: the model that it was made of, or a snapshot that was hot loaded over it."""

from __future__ import annotations

from cookbook.control_plane import CALL_TIMEOUT_S, ControlPlane
from cookbook.deployments import DeploymentHandle
from cookbook.errors import ProvisioningError

__all__ = ["served_snapshot"]


def served_snapshot(control: ControlPlane, deployment: DeploymentHandle, timeout_s: float = CALL_TIMEOUT_S) -> str:
    """The snapshot that was hot loaded into a deployment; "" = none: it serves the model that it was made of.

    Args:
        timeout_s: for each of two calls.

    Raises:
        ProvisioningError: it is gone, does not answer, or its replicas serve different ones.
    """
    name = deployment.deployment_id
    found = control.deployment(name, timeout_s)
    if found is None:
        raise ProvisioningError(f"deployment {name} is gone.")
    if not any(found.get(key) for key in ("enableHotLoad", "hotLoadTrainerJob", "hotLoadBucketUrl")):
        return ""
    status = control.call(
        f"asking deployment {name} what it serves",
        lambda: control.deployments.hotload_check_status(name, deployment.base_model, timeout=max(1, int(timeout_s))),
        timeout_s,
    )
    served = {str(replica.get("current_snapshot_identity") or "") for replica in status.get("replicas") or []}
    if len(served) > 1:
        raise ProvisioningError(f"the replicas of deployment {name} serve different snapshots: {sorted(served)}.")
    return served.pop() if served else ""
