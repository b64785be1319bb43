"""Our side of part `dpo`: steps through the official client and the embedded backend. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from fireworks.training.sdk import AdamParams

from cookbook.client import ReconnectableClient
from cookbook.config import DPOConfig, environment
from cookbook.data.pair_datums import pair_datums, response_logprobs
from cookbook.data.pairs import RenderedPair
from cookbook.data.rendering import RenderedRow
from cookbook.deadlines import Deadline
from cookbook.ledger import ResourceLedger
from cookbook.losses.preference import PairReference, objective_of
from cookbook.preference_step import preference_step
from cookbook.provisioning import connect, provision_trainer, release_trainers
from cookbook.run import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSON file: list of {prompt, chosen, rejected} token ids")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    options = parser.parse_args()

    pairs = [rendered(**pair) for pair in json.loads(Path(options.rows).read_text())]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            log_path=f"{folder}/run",
            base_model=options.model,
            dataset=options.rows,
            learning_rate=options.learning_rate,
            beta=options.beta,
        )
        print(json.dumps(measure(config, pairs, options.steps)))


def rendered(prompt: list[int], chosen: list[int], rejected: list[int]) -> RenderedPair:
    """A pair from token ids."""

    def side(answer: list[int]) -> RenderedRow:
        weights = np.array([0.0] * len(prompt) + [1.0] * len(answer), dtype=np.float32)
        return RenderedRow(np.array(prompt + answer, dtype=np.int32), weights)

    return RenderedPair(side(chosen), side(rejected), len(prompt))


def measure(config: DPOConfig, pairs: list[RenderedPair], steps: int) -> dict[str, list[float]]:
    """Seconds and loss of each step, datums and JSON included, as the recipe does them; seconds of the reference."""
    env = environment()
    with (
        connect(config.backend, env) as control,
        RunDirectory.open(config.log_path, recipe="dpo", config=config.model_dump(mode="json"), home=env.home) as run,
    ):
        ledger = ResourceLedger(run)
        trainer = provision_trainer(control, ledger, config, deadline=Deadline(600))
        try:
            with ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model) as client:
                return steps_of(client, config, pairs, steps)
        finally:
            release_trainers(control, ledger, delete=True)


def steps_of(
    client: ReconnectableClient, config: DPOConfig, pairs: list[RenderedPair], steps: int
) -> dict[str, list[float]]:
    """The untrained policy is the reference: its pass costs what a trainer for the reference alone would take."""
    started = time.perf_counter()
    references = reference_pass(client, pairs)
    result: dict[str, list[float]] = {"seconds": [], "losses": [], "reference": [time.perf_counter() - started]}
    adam = AdamParams(learning_rate=config.learning_rate, beta2=0.999, eps=1e-8, weight_decay=0.01)
    for _ in range(steps):
        started = time.perf_counter()
        step = preference_step(
            client,
            pairs,
            objective_of(config),
            adam,
            references=references,
            grad_accumulation_normalization=None,
            timeout_s=600.0,
        )
        result["seconds"].append(time.perf_counter() - started)
        result["losses"].append(step.loss)
    return result


def reference_pass(client: ReconnectableClient, pairs: list[RenderedPair]) -> list[PairReference]:
    """Sums of the logprobs of both answers."""
    answer = client.forward(pair_datums(pairs), "cross_entropy", timeout_s=600.0)
    logprobs = [output["logprobs"].to_torch() for output in answer.loss_fn_outputs]
    sums = [[float(side.double().sum()) for side in sides] for sides in response_logprobs(pairs, logprobs)]
    return [PairReference(chosen, rejected) for chosen, rejected in sums]


if __name__ == "__main__":
    main()
