"""`make run`: a real model learns a task with checkable answers, through the whole path, on this machine.

Pulls SmolLM2-135M-Instruct, writes the task's rows, runs the SFT flow on the embedded backend with the config in
presets/sft-quickstart.yaml, prints the summary and a few held-out questions with the answers before and after.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from datetime import datetime
from pathlib import Path

from cookbook.config import SFTConfig, environment
from cookbook.data import make_task
from cookbook.errors import CookbookError
from cookbook.models import pull
from cookbook.validation import load_config

__all__ = ["main"]

CHECKOUT = Path(__file__).parents[1]
PRESET = CHECKOUT / "presets" / "sft-quickstart.yaml"
NUM_TRAIN, NUM_HELD_OUT = 3000, 300


def main() -> None:
    """Run the quickstart; exit 1 with one message when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-path", help="run directory; the same one again resumes (default: a new one in runs/)")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        run_quickstart(options.log_path or f"runs/sft-quickstart-{datetime.now():%Y%m%d-%H%M%S}")
    except CookbookError as error:
        sys.exit(f"error: {error}")
    print(f"  {'in all':<23}  {time.monotonic() - started:.0f} s")


def run_quickstart(log_path: str) -> None:
    """Pull, make the task, train, print."""
    model = pull("smollm2-135m-instruct", environment().home / "models", progress=print)
    train, held_out = make_task(CHECKOUT / "runs" / "data", num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=0)
    config = load_config(
        SFTConfig,
        file=PRESET,
        overrides={
            "log_path": log_path,
            "base_model": model.name,
            "dataset": str(train),
            "evaluation.dataset": str(held_out),
        },
    )
    # Its telemetry fights with the temporary server's own start over the fresh database.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from flows.sft import sft  # after the config: a mistake in it shows before Prefect has started

    summary = sft(config)
    print(f"\n{summary.to_text()}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
