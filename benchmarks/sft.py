"""Part `sft`: a full-parameter SFT step of SmolLM2-135M, TRL's SFTTrainer and ours in turn on the same rows.

Ours is the whole path: the official client, JSON over loopback, the embedded backend's trainer process. Each round runs
the peer in fp32, the peer in bf16 and ours; the first step of each is a warm-up. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from cookbook.config import environment
from cookbook.models import load_tokenizer, resolve_model

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
NUM_ROWS, ROW_TOKENS = 16, 95
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Series:
    """Steps of one contender over all rounds."""

    name: str
    seconds: list[float]
    losses: list[float]

    @property
    def tokens_per_s(self) -> float:
        """Median over all steps that are no warm-up."""
        return NUM_ROWS * ROW_TOKENS / statistics.median(self.seconds)


def token_rows(folder: Path) -> list[list[int]]:
    """16 rows of 95 tokens: the licence text, cut."""
    tokenizer = load_tokenizer(MODEL, environment().home / "models")
    tokens = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    return [tokens[i * ROW_TOKENS : (i + 1) * ROW_TOKENS] for i in range(NUM_ROWS)]


def gemm_peak() -> float:
    """bf16 FLOP/s of a 2048 x 2048 matrix product on this machine."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def run_contender(command: list[str], arguments: list[str]) -> tuple[list[float], list[float]]:
    """Step seconds without the first, and all losses."""
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["seconds"][1:], result["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()

    model = str(resolve_model(MODEL, environment().home / "models"))
    peer = [options.peer_python, "benchmarks/peer_trl_sft.py"]
    contenders = {
        "TRL fp32": peer,
        "TRL bf16": [*peer, "--bf16"],
        "ours": [sys.executable, "-m", "benchmarks.ours_sft"],
    }
    series = {name: Series(name, [], []) for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(token_rows(Path(folder))))
        arguments = ["--model", model, "--rows", str(rows), "--steps", str(options.steps)]
        arguments += ["--learning-rate", str(LEARNING_RATE)]
        for round_number in range(options.rounds):
            for name, command in contenders.items():
                seconds, losses = run_contender(command, arguments)
                series[name].seconds.extend(seconds)
                series[name].losses[:] = losses
                print(f"round {round_number + 1}, {name}: {', '.join(f'{s:.2f}' for s in seconds)} s", file=sys.stderr)
    print(report(series))


def report(series: dict[str, Series]) -> str:
    """The result as markdown."""
    peak = gemm_peak()
    limit = peak / (6 * 134.5e6)
    base = series["TRL fp32"].tokens_per_s
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, torch {torch.__version__}, bf16 GEMM {peak / 1e9:.0f} GFLOP/s",
        "",
        "| contender | tok/s (median) | against TRL fp32 | share of the GEMM limit | losses |",
        "|---|---|---|---|---|",
    ]
    for s in series.values():
        losses = ", ".join(f"{loss:.3f}" for loss in s.losses)
        shares = f"{s.tokens_per_s / base:.2f}x | {s.tokens_per_s / limit:.0%}"
        lines.append(f"| {s.name} | {s.tokens_per_s:.0f} | {shares} | {losses} |")
    lines += ["", *(f"{s.name}, seconds a step: {', '.join(f'{x:.2f}' for x in s.seconds)}" for s in series.values())]
    return "\n".join(lines)


def machine() -> str:
    """CPU, threads and system in one line."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.processor())
    return f"{cpu}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    main()
