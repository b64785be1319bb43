"""Our side of part `grpo`: whole RL steps through the official SDK and the embedded backend. Prints one JSON line.

A step is what the recipe does: sample all groups from the deployment, score them, one policy step, weight sync.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cookbook.config import RLConfig, environment
from cookbook.data.rl import load_rl_data
from cookbook.deadlines import Deadline
from cookbook.deployments import provision_deployment, release_deployments
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import connect, provision_trainer, release_trainers
from cookbook.rollouts.collect import RolloutCollector
from cookbook.rollouts.ledger import RowLedger
from cookbook.rollouts.sampler import RolloutSampler
from cookbook.run import RunDirectory


def distinct_characters(completion: str, row: Mapping[str, Any]) -> float:
    """Share of different characters: cheap, and different for each completion. The peer has the same."""
    return len(set(completion)) / max(1, len(completion))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSONL file of prompts, {'messages': [...]}, all of one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--completions", type=int, required=True, help="completions a prompt")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    options = parser.parse_args()

    num_prompts = len(Path(options.rows).read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        config = RLConfig(
            log_path=f"{folder}/run",
            base_model=options.model,
            dataset=options.rows,
            reward="benchmarks.ours_grpo:distinct_characters",
            prompt_groups_per_step=num_prompts,
            completions_per_prompt=options.completions,
            max_completion_tokens=options.max_tokens,
            max_rows=None,
            epochs=options.steps,
            kl_beta=0.0,
            learning_rate=options.learning_rate,
            concurrency={"mode": "fixed", "max_concurrency": num_prompts * options.completions},
            weight_sync={"weight_sync_interval": 1},
        )
        print(json.dumps(measure(config, options.steps)))


def measure(config: RLConfig, steps: int) -> dict[str, list[Any]]:
    """What each step took and gave, JSON and files included."""
    env = environment()
    with ExitStack() as stack:
        control = stack.enter_context(connect(config.backend, env))
        contents = config.model_dump(mode="json")
        run = stack.enter_context(RunDirectory.open(config.log_path, recipe="rl", config=contents, home=env.home))
        ledger = ResourceLedger(run)
        trainer = provision_trainer(control, ledger, config, deadline=Deadline(600))
        stack.callback(release_trainers, control, ledger, delete=True)
        deployment = provision_deployment(
            control, ledger, config, trainer=trainer, run_id=run.run_id, deadline=Deadline(600)
        )
        stack.callback(release_deployments, control, ledger)
        data = load_rl_data(config, env.home / "models", run.path / "data")
        sampler = stack.enter_context(
            RolloutSampler(
                control.deployments.inference_url,
                deployment.model,
                control.jobs.api_key,
                data.train.renderer.tokenizer,
                config.concurrency,
                1,
                600.0,
                config.retry,
            )
        )
        collector = stack.enter_context(RolloutCollector(sampler, data, data.score, config))
        return _steps(config, steps, stack, control, trainer, deployment, collector, RowLedger(total=data.total_rows))


def _steps(
    config: RLConfig,
    steps: int,
    stack: ExitStack,
    control: Any,
    trainer: Any,
    deployment: Any,
    collector: RolloutCollector,
    ledger: RowLedger,
) -> dict[str, list[Any]]:
    from fireworks.training.sdk import AdamParams

    from cookbook.client import ReconnectableClient
    from cookbook.policy_step import policy_step
    from cookbook.weight_sync import WeightSync

    client = stack.enter_context(ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model))
    sync = stack.enter_context(WeightSync(control, deployment, trainer, client, config.weight_sync))
    sync.sync("start", first=True)
    adam = AdamParams(learning_rate=config.learning_rate, beta2=0.999, eps=1e-8, weight_decay=0.0)
    result: dict[str, list[Any]] = {
        name: [] for name in ("seconds", "sample", "train", "sync", "tokens", "rewards", "gaps")
    }
    for step in range(steps):
        moments = [time.perf_counter()]
        collected = collector.collect(ledger, step=step, version=sync.version)
        ledger = collected.ledger
        moments.append(time.perf_counter())
        trained = policy_step(client, collected.groups, config, adam)
        moments.append(time.perf_counter())
        sync.sync(f"step-{step + 1}", first=False)
        moments.append(time.perf_counter())
        completions = [completion for group in collected.groups for completion in group.completions]
        result["seconds"].append(moments[3] - moments[0])
        for number, name in enumerate(("sample", "train", "sync")):
            result[name].append(moments[number + 1] - moments[number])
        result["tokens"].append(sum(len(completion.tokens) for completion in completions))
        result["rewards"].append(sum(completion.reward for completion in completions) / len(completions))
        result["gaps"].append(trained.metrics["sampler/logprob_gap_p99"])
    return result


if __name__ == "__main__":
    main()
