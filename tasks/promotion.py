"""Turning the final checkpoint into a named model."""

from __future__ import annotations

from cookbook.checkpoints import last_promotable
from cookbook.errors import CheckpointError
from cookbook.models.provenance import provenance_of, record_provenance
from cookbook.provisioning import promote as promote_checkpoint
from tasks.record import recorded
from tasks.run import Run

__all__ = ["promote"]


@recorded(deadline=lambda config: config.promote_timeout_s, retried=True, persist=True)
def promote(run: Run) -> dict[str, str]:
    """Promote the last promotable checkpoint to `output_model_id`, and record where the model comes from.

    Returns its resource name. Doing it again with the same checkpoint gives the same model.

    Raises:
        CheckpointError: the run has no promotable checkpoint, or the id is taken by another model.
        LeaseLost: another process has taken the run over; promoting is its business.
    """
    config = run.config
    row = last_promotable(run.directory.path)
    if row is None or row.source_job_id is None or row.sampler_path is None:
        raise CheckpointError(f"{run.directory.path} has no promotable checkpoint, so nothing to promote.")
    run.directory.check_lease()
    run.model = promote_checkpoint(
        run.control,
        job_id=row.source_job_id,
        snapshot_name=row.sampler_path,
        output_model_id=config.model_id(run.directory.run_id),
        base_model=run.trainer.base_model if run.trainer is not None else config.base_model,
        timeout_s=config.promote_timeout_s,
    )
    run.directory.check_lease()
    made = provenance_of(run.directory.path, run.model, row, home=run.env.home)
    record_provenance(run.env.home, made)
    return {"model": run.model.name}
