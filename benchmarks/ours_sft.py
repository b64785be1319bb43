"""Our side of part `sft`: steps through the official client and the embedded backend. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from fireworks.training.sdk import AdamParams

from cookbook.client import ReconnectableClient
from cookbook.config import SFTConfig, environment
from cookbook.data.datums import datum_from_row, token_mean_weights
from cookbook.data.rendering import RenderedRow
from cookbook.deadlines import Deadline
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import connect, provision_trainer, release_trainers
from cookbook.run import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSON file: list of lists of token ids, all of one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    options = parser.parse_args()

    token_rows = json.loads(Path(options.rows).read_text())
    rows = [RenderedRow(np.array(row, dtype=np.int32), np.ones(len(row), dtype=np.float32)) for row in token_rows]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(log_path=f"{folder}/run", base_model=options.model, dataset=options.rows)
        print(json.dumps(measure(config, rows, options.steps, options.learning_rate)))


def measure(config: SFTConfig, rows: list[RenderedRow], steps: int, learning_rate: float) -> dict[str, list[float]]:
    """Seconds and loss of each step, datums and JSON included, as the recipe does them."""
    env = environment()
    with (
        connect(config.backend, env) as control,
        RunDirectory.open(config.log_path, recipe="sft", config=config.model_dump(mode="json"), home=env.home) as run,
    ):
        ledger = ResourceLedger(run)
        trainer = provision_trainer(control, ledger, config, deadline=Deadline(600))
        try:
            with ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model) as client:
                adam = AdamParams(learning_rate=learning_rate, beta2=0.999, eps=1e-8, weight_decay=0.01)
                results = [train_step(client, rows, adam) for _ in range(steps)]
        finally:
            release_trainers(control, ledger, delete=True)
    return {"seconds": [s for s, _ in results], "losses": [loss for _, loss in results]}


def train_step(client: ReconnectableClient, rows: list[RenderedRow], adam: AdamParams) -> tuple[float, float]:
    """One step on `rows`: wall seconds and the mean loss a token."""
    started = time.perf_counter()
    weights = token_mean_weights(rows)
    datums = [datum_from_row(row.tokens, w) for row, w in zip(rows, weights, strict=True)]
    result = client.train_step(datums, "cross_entropy", adam)
    return time.perf_counter() - started, result.loss_sum


if __name__ == "__main__":
    main()
