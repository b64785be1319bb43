"""What the flow tests share: small configs and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_ROWS = 24
BATCH_SIZE = 8


def write_rows(path: Path, num_rows: int = NUM_ROWS, start: int = 0) -> Path:
    """Chat rows with short checkable answers."""
    questions = [(f"{n} + {n + 1} =", str(2 * n + 1)) for n in range(start, start + num_rows)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_parameters(log_path: Path, model: Path, rows: Path, **fields: Any) -> dict[str, Any]:
    """A whole SFT config as plain data, for a form, a YAML file or a submitted run."""
    return {
        "log_path": str(log_path),
        "base_model": str(model),
        "dataset": str(rows),
        "batch_size": BATCH_SIZE,
        "epochs": 1,
        "learning_rate": 3e-3,
        "infra": {"extra_args": ["--compute-dtype=float32", "--threads=1"]},
        **fields,
    }
