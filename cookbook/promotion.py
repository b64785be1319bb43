"""Models out of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.deadlines import Deadline

if TYPE_CHECKING:
    from cookbook.control_plane import ControlPlane

__all__ = ["PromotedModel", "promote"]


@dataclass(frozen=True)
class PromotedModel:
    """A model made out of a checkpoint."""

    name: str
    """Resource name, accounts/<account>/models/<id>."""
    kind: str
    """"HF_BASE_MODEL" (a whole model) or "HF_PEFT_ADDON" (a LoRA adapter)."""
    folder: Path | None
    """Where it lies, if that is on this machine."""


def promote(
    control: ControlPlane,
    *,
    job_id: str,
    snapshot_name: str,
    output_model_id: str,
    base_model: str,
    timeout_s: float,
) -> PromotedModel:
    """Make a model out of a sampler snapshot. Doing it again with the same snapshot gives the same model.

    Args:
        job_id, snapshot_name: the trainer job (it may be gone) and the snapshot's full name: `source_job_id` and
            `sampler_path` of a checkpoint row.
        output_model_id: last part of the model's name.
        base_model: by its name on the wire, what the snapshot was trained from.
        timeout_s: seconds for all of it.

    Raises:
        ProvisioningError: no such snapshot, the id is taken by another model, or it is late.
    """
    deadline = Deadline(timeout_s)
    account = control.account_id(timeout_s)
    checkpoint = f"accounts/{account}/rlorTrainerJobs/{job_id}/checkpoints/{snapshot_name}"
    model: dict[str, Any] = control.call(
        f"promoting {snapshot_name} of trainer {job_id} to output_model_id {output_model_id!r}",
        lambda: control.jobs.promote_checkpoint(
            name=checkpoint, output_model_id=output_model_id, base_model=base_model
        ),
        deadline.remaining(),
    )
    folder = model.get("path")
    return PromotedModel(
        name=model.get("name") or f"accounts/{account}/models/{output_model_id}",
        kind=str(model.get("kind", "")),
        folder=Path(folder) if folder else None,
    )
