"""Part `dpo`: a full-parameter DPO step of SmolLM2-135M, TRL's DPOTrainer and ours in turn on the same pairs.

8 pairs: prompts of 72 tokens, both answers of 72. Reference logprobs are computed once, before the first step, and
timed apart. Ours is the whole path: the official client, both passes of a loss on the client, JSON over loopback, the
embedded backend's trainer process. Each round runs the peer in fp32, the peer in bf16 and ours; the first step of each
is a warm-up. Prints a table in markdown, and fails where the losses of ours and of the peer in fp32 disagree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.grpo import run_contender
from benchmarks.sft import MODEL, ROOT, gemm_peak, machine
from cookbook.config import environment
from cookbook.models import load_tokenizer, resolve_model

NUM_PAIRS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 72, 72
LEARNING_RATE, BETA = 1e-6, 0.1
LOSS_TOLERANCE = 0.02
"""Nats, of the steps' losses, which are near 0.7: ours computes in bfloat16."""


@dataclass
class Series:
    """Steps of one contender over all rounds, warm-ups left out; losses are of the last round, with all steps."""

    name: str
    seconds: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, result: dict[str, list[Any]]) -> None:
        self.seconds += result["seconds"][1:]
        self.reference += result["reference"]
        self.losses = result["losses"]

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def first_epoch(self) -> float:
        """Median seconds of a step and of the reference's pass over its pairs."""
        return self.step + statistics.median(self.reference)


def token_pairs() -> list[dict[str, list[int]]]:
    """8 pairs: the licence text, cut into prompt, chosen and rejected answer."""
    tokenizer = load_tokenizer(MODEL, environment().home / "models")
    tokens = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    size = PROMPT_TOKENS + 2 * ANSWER_TOKENS
    rows = [tokens[i * size : (i + 1) * size] for i in range(NUM_PAIRS)]
    middle = PROMPT_TOKENS + ANSWER_TOKENS
    return [
        {"prompt": row[:PROMPT_TOKENS], "chosen": row[PROMPT_TOKENS:middle], "rejected": row[middle:]} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=("ours", "peers"), help="run one side alone, for a quick look")
    options = parser.parse_args()

    model = str(resolve_model(MODEL, environment().home / "models"))
    peer = [options.peer_python, "benchmarks/peer_trl_dpo.py"]
    contenders = {
        "TRL fp32": peer,
        "TRL bf16": [*peer, "--bf16"],
        "ours": [sys.executable, "-m", "benchmarks.ours_dpo"],
    }
    if options.only:
        contenders = {name: c for name, c in contenders.items() if (name == "ours") == (options.only == "ours")}
    series = {name: Series(name) for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "pairs.json"
        rows.write_text(json.dumps(token_pairs()))
        arguments = ["--model", model, "--rows", str(rows), "--steps", str(options.steps)]
        arguments += ["--learning-rate", str(LEARNING_RATE), "--beta", str(BETA)]
        for round_number in range(options.rounds):
            for name, command in contenders.items():
                result = run_contender(command, arguments)
                series[name].add(result)
                seconds = ", ".join(f"{s:.2f}" for s in result["seconds"])
                print(f"round {round_number + 1}, {name}: {seconds} s", file=sys.stderr)
    print(report(series))
    if not options.only:
        check_losses(series["TRL fp32"].losses, series["ours"].losses)


def check_losses(theirs: list[float], ours: list[float]) -> None:
    """The same objective: equal losses before the first update, and after each of the next ones."""
    gap = max(abs(one - other) for one, other in zip(theirs, ours, strict=True))
    if gap > LOSS_TOLERANCE:
        raise SystemExit(f"the losses differ by up to {gap:.4f} nats: {theirs} and {ours}")


def report(series: dict[str, Series]) -> str:
    """The result as markdown."""
    base = next(iter(series.values()))
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, bf16 GEMM {gemm_peak() / 1e9:.0f} "
        "GFLOP/s",
        "",
        f"| contender | s a step (median) | against {base.name} | with the reference's pass | against {base.name} | "
        "losses |",
        "|---|---|---|---|---|---|",
    ]
    for s in series.values():
        losses = ", ".join(f"{loss:.4f}" for loss in s.losses)
        lines.append(
            f"| {s.name} | {s.step:.2f} | {base.step / s.step:.2f}x | {s.first_epoch:.2f} | "
            f"{base.first_epoch / s.first_epoch:.2f}x | {losses} |"
        )
    lines.append("")
    for s in series.values():
        steps, passes = (", ".join(f"{x:.2f}" for x in values) for values in (s.seconds, s.reference))
        lines.append(f"{s.name}, seconds a step: {steps}; reference's pass: {passes}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
