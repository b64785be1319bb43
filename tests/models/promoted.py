"""A short run on the real backend and the model it promoted, for the tests of provenance, card and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fireworks.training.sdk import AdamParams
from numpy.typing import NDArray

from cookbook.checkpoints import CheckpointRow, last_promotable, save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.config import SFTConfig
from cookbook.control_plane import ControlPlane
from cookbook.data.datums import datum_from_row
from cookbook.data.jsonl import JsonlFile
from cookbook.models.provenance import provenance_of, record_provenance
from cookbook.promotion import PromotedModel, promote
from cookbook.run import Progress, RunDirectory
from tests.running_backend import MODEL, WireBackend

PROBE = [256, *range(65, 85), 257]
"""A row whose logprobs are compared."""


@dataclass(frozen=True)
class Promoted:
    """A run's promoted model, and what the trainer's own weights said about the probe."""

    home: Path
    log_path: Path
    model: PromotedModel
    row: CheckpointRow
    logprobs: NDArray[np.float32]
    """float32 (len(PROBE) - 1,), of the trainer in float32."""

    @property
    def name(self) -> str:
        return self.model.name.rpartition("/")[2]


def make_promoted(
    backend: WireBackend, start_trainer: Callable[..., str], folder: Path, *, lora_rank: int, model_id: str
) -> Promoted:
    """Three steps on the tiny model, evaluated before and after, promoted and recorded."""
    job = start_trainer(f"job-{model_id}", lora_rank)
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text('{"messages": []}\n' * 7)
    log_path = folder / "run"
    config = SFTConfig(log_path=str(log_path), base_model="tiny", dataset=str(rows), lora_rank=lora_rank, seed=3)
    with (
        ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control,
        RunDirectory.open(log_path, recipe="sft", config=config.model_dump(mode="json"), home=backend.home) as run,
        ReconnectableClient(control.jobs, job, MODEL, lora_rank, seed=3, default_timeout_s=60) as client,
    ):
        file = JsonlFile.open(rows)
        run.pin_data("data-fingerprint", sha256=file.fingerprint, num_rows=len(file))
        rows.write_text("changed since\n")
        data = [datum_from_row(PROBE, [0.0] + [1.0] * (len(PROBE) - 1))]
        for _ in range(3):
            client.train_step(data, "cross_entropy", AdamParams(learning_rate=3e-2))
        state = Progress(3, 1, 0, 21, permutation_seed=3, total_steps=3).to_loop_state()
        save_checkpoint(client, "step-3", log_path, state, "sampler", base_model="tiny")
        logprobs = client.forward(data, "cross_entropy").loss_fn_outputs[0]["logprobs"].to_numpy()
        metrics: list[dict[str, Any]] = [{"step": 0, "eval/loss": 5.5}, {"step": 2, "train/loss": 1.0}]
        metrics.append({"step": 3, "eval/loss": 0.25, "eval/num_rows": 4})
        (log_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        row = last_promotable(log_path)
        assert row is not None
        assert row.sampler_path is not None
        model = promote(
            control,
            job_id=job,
            snapshot_name=row.sampler_path,
            output_model_id=model_id,
            base_model=MODEL,
            timeout_s=60,
        )
        record_provenance(backend.home, provenance_of(log_path, model, row, home=backend.home))
        control.delete(job)
    return Promoted(backend.home, log_path, model, row, logprobs)
