"""Part `sample`: 64 completions of SmolLM2-135M, transformers' generate and our engine in turn on the same prompts.

8 prompts of 58 tokens with 8 completions each, as in a step of reinforcement learning, 48 new tokens, temperature 1.
Each round runs the peer in fp32, the peer in bf16 and ours, each in a process of its own; the first pass of each is a
warm-up. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.sft import MODEL, ROOT, gemm_peak, machine
from cookbook.config import environment
from cookbook.models import load_tokenizer, resolve_model

NUM_PROMPTS, COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 58, 48
WEIGHTS = 134.5e6


def prompts(num_prompts: int) -> list[list[int]]:
    """Pieces of the licence text, one for each sequence, those of one prompt side by side."""
    tokenizer = load_tokenizer(MODEL, environment().home / "models")
    tokens = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    rows = [tokens[i * 30 : i * 30 + PROMPT_TOKENS] for i in range(num_prompts)]
    return [row for row in rows for _ in range(NUM_PROMPTS * COMPLETIONS // num_prompts)]


def run_contender(command: list[str], arguments: list[str]) -> list[float]:
    """Seconds of each pass without the first."""
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [float(s) for s in json.loads(done.stdout.strip().splitlines()[-1])["seconds"][1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="distinct prompts among the 64 sequences")
    options = parser.parse_args()

    peer = [options.peer_python, "benchmarks/peer_hf_sample.py"]
    contenders = {
        "HF generate fp32": peer,
        "HF generate bf16": [*peer, "--bf16"],
        "ours": [sys.executable, "-m", "benchmarks.ours_sample"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.json"
        rows.write_text(json.dumps(prompts(options.prompts)))
        model = str(resolve_model(MODEL, environment().home / "models"))
        arguments = ["--model", model, "--prompts", str(rows), "--passes", str(options.passes)]
        arguments += ["--new-tokens", str(NEW_TOKENS)]
        for round_number in range(options.rounds):
            for name, command in contenders.items():
                passes = run_contender(command, arguments)
                seconds[name] += passes
                print(f"round {round_number + 1}, {name}: {', '.join(f'{s:.2f}' for s in passes)} s", file=sys.stderr)
    print(report(seconds))


def report(seconds: dict[str, list[float]]) -> str:
    """The result as markdown."""
    peak = gemm_peak()
    limit = peak / (2 * WEIGHTS)
    speeds = {name: NUM_PROMPTS * COMPLETIONS * NEW_TOKENS / statistics.median(s) for name, s in seconds.items()}
    best_peer = max(speed for name, speed in speeds.items() if name != "ours")
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, bf16 GEMM {peak / 1e9:.0f} GFLOP/s, "
        f"load average {os.getloadavg()[0]:.1f}",
        "",
        "| contender | tok/s (median) | against the better peer | share of the GEMM limit |",
        "|---|---|---|---|",
    ]
    lines += [f"| {n} | {speed:.0f} | {speed / best_peer:.2f}x | {speed / limit:.0%} |" for n, speed in speeds.items()]
    lines += ["", *(f"{name}, seconds a pass: {', '.join(f'{s:.2f}' for s in raw)}" for name, raw in seconds.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
