"""Getting the trainer of a run: found again by its id, or made."""

from __future__ import annotations

import time

from cookbook.deadlines import Deadline
from cookbook.provisioning import provision_trainer as provision
from tasks.record import recorded
from tasks.run import Run

__all__ = ["provision_trainer"]


@recorded(deadline=lambda config: config.infra.trainer_timeout_s, retried=True, persist=True)
def provision_trainer(run: Run) -> dict[str, str]:
    """Provision the policy trainer within one deadline over waiting for capacity and starting; return its identity.

    The body runs again on a retried flow run: the resource id makes it idempotent, and a trainer that died meanwhile is
    noticed, which a cached result would not tell.

    Raises:
        ProvisioningError: the trainer failed, or was not ready in time.
    """
    started = time.monotonic()
    run.trainer = provision(
        run.control, run.ledger, run.config, role="policy", deadline=Deadline(run.config.infra.trainer_timeout_s)
    )
    run.say(f"trainer {run.trainer.job_id} is ready ({time.monotonic() - started:.1f} s)")
    return {"job_id": run.trainer.job_id, "generation": str(run.trainer.generation)}
