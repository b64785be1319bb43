"""Part `grpo`: a whole GRPO step of SmolLM2-135M, TRL's GRPOTrainer and ours in turn on the same prompts.

8 prompts of about 58 tokens, 8 completions each of up to 48 tokens, full-parameter, no KL term. Ours is the whole
path: sampling from the deployment, reward, train step, weight sync, all by the official SDK. Each round runs the peer
in fp32, the peer in bf16 and ours; the first step of each is a warm-up. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.sft import MODEL, ROOT, gemm_peak, machine
from cookbook.config import environment
from cookbook.models import load_tokenizer, resolve_model

NUM_PROMPTS, PROMPT_TOKENS = 8, 58
COMPLETIONS, MAX_TOKENS = 8, 48
LEARNING_RATE = 1e-5
PHASES = ("sample", "train", "sync")


@dataclass
class Series:
    """Steps of one contender over all rounds, warm-ups left out; rewards are of the last round, with all steps."""

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(step[name] for step in self.steps)

    def add(self, result: dict[str, list[Any]]) -> None:
        names = [name for name, values in result.items() if len(values) == len(result["seconds"])]
        self.steps += [{name: result[name][i] for name in names} for i in range(1, len(result["seconds"]))]
        self.rewards = result["rewards"]


def prompts() -> list[list[dict[str, str]]]:
    """8 chats of about 58 tokens: go on with a piece of the licence text."""
    tokenizer = load_tokenizer(MODEL, environment().home / "models")
    text = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]

    def chat(piece: list[int]) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Go on with this text: " + tokenizer.decode(piece)}]

    def length(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    size = PROMPT_TOKENS - length(chat([]))
    return [chat(text[i * size : (i + 1) * size]) for i in range(NUM_PROMPTS)]


def run_contender(command: list[str], arguments: list[str]) -> dict[str, list[Any]]:
    """What the contender prints last."""
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, list[Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=("ours", "peers"), help="run one side alone, for a quick look")
    options = parser.parse_args()

    model = str(resolve_model(MODEL, environment().home / "models"))
    peer = [options.peer_python, "benchmarks/peer_trl_grpo.py"]
    contenders = {
        "TRL fp32": peer,
        "TRL bf16": [*peer, "--bf16"],
        "ours": [sys.executable, "-m", "benchmarks.ours_grpo"],
    }
    if options.only:
        contenders = {name: c for name, c in contenders.items() if (name == "ours") == (options.only == "ours")}
    series = {name: Series(name) for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in prompts()))
        arguments = ["--model", model, "--rows", str(rows), "--steps", str(options.steps)]
        arguments += ["--completions", str(COMPLETIONS), "--max-tokens", str(MAX_TOKENS)]
        arguments += ["--learning-rate", str(LEARNING_RATE)]
        for round_number in range(options.rounds):
            for name, command in contenders.items():
                result = run_contender(command, arguments)
                series[name].add(result)
                seconds = ", ".join(f"{s:.1f}" for s in result["seconds"])
                print(f"round {round_number + 1}, {name}: {seconds} s", file=sys.stderr)
    print(report(series))


def report(series: dict[str, Series]) -> str:
    """The result as markdown."""
    base = next(iter(series.values())).median("seconds")
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, bf16 GEMM {gemm_peak() / 1e9:.0f} "
        "GFLOP/s",
        "",
        f"| contender | s a step (median) | against {next(iter(series))} | completion tokens a step | mean rewards |",
        "|---|---|---|---|---|",
    ]
    for s in series.values():
        seconds = s.median("seconds")
        rewards = ", ".join(f"{reward:.3f}" for reward in s.rewards)
        lines.append(f"| {s.name} | {seconds:.1f} | {base / seconds:.2f}x | {s.median('tokens'):.0f} | {rewards} |")
    lines.append("")
    for s in series.values():
        seconds_a_step = ", ".join(f"{step['seconds']:.1f}" for step in s.steps)
        lines.append(f"{s.name}, seconds a step: {seconds_a_step}")
        if all(name in step for step in s.steps for name in PHASES):
            parts = ", ".join(f"{name} {s.median(name):.1f}" for name in PHASES)
            lines.append(f"{s.name}, medians: {parts} s; logprob gap p99 {s.median('gaps'):.3f} nats")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
