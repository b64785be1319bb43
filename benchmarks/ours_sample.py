"""Our side of part `sample`: the deployment's engine, with log-probabilities. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from cookbook.backend.decoder import pick_compute_dtype
from cookbook.backend.deployment.engine import Engine, GenerationRequest
from cookbook.backend.deployment.llama import LlamaModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON file: list of lists of token ids, one a sequence")
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()

    rows = [tuple(row) for row in json.loads(Path(options.prompts).read_text())]
    engine = Engine(
        lambda: LlamaModel.load(Path(options.model), pick_compute_dtype()),
        "",
        max_batch=len(rows),
        max_context=2048,
        max_waiting=len(rows),
    )
    seconds = [one_pass(engine, rows, options.new_tokens) for _ in range(options.passes)]
    engine.close()
    print(json.dumps({"seconds": seconds}))


def one_pass(engine: Engine, rows: list[tuple[int, ...]], new_tokens: int) -> float:
    """Seconds for all sequences, nothing known of their prompts before."""
    engine.reset_prefix_cache()
    started = time.perf_counter()
    tickets = [engine.submit(GenerationRequest(row, new_tokens, seed=seed)) for seed, row in enumerate(rows)]
    generated = [ticket.result() for ticket in tickets]
    seconds = time.perf_counter() - started
    assert all(len(g.tokens) == len(g.logprobs) == new_tokens for g in generated)
    return seconds


if __name__ == "__main__":
    main()
