"""What the fault suites counted, as one table for benchmarks/RESULTS.md: `python -m tests.faults.report FOLDER`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["kill_table"]


def kill_table(cells: Sequence[dict[str, Any]]) -> str:
    """A line for each recipe and seed: kills by process, survived and lost, and how the runs came out."""
    names = ("flow", "trainer", "reference", "deployment", "control-plane", "supervisor")
    head = ("recipe, seed", *names, "kills", "lost", "runs", "identical", "minutes")
    rows = [head, tuple("---" for _ in head)]
    for cell in sorted(cells, key=lambda cell: (cell["recipe"], cell["seed"])):
        by = Counter(result["kill"].partition("@")[0] for result in cell["results"])
        lost = sum(not result["survived"] for result in cell["results"])
        ends = (len(cell["results"]), lost, cell["runs"], cell["identical"], round(cell["seconds"] / 60, 1))
        rows.append((f"{cell['recipe']}, {cell['seed']}", *(str(by[name]) for name in names), *map(str, ends)))
    total = [len(cell["results"]) for cell in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{sum(total)} kills below Prefect."


def main() -> int:
    folder = Path(sys.argv[1])
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("kills-*.json"))]
    print(kill_table(cells))
    lost = [result for cell in cells for result in cell["results"] if not result["survived"]]
    for result in lost:
        print(f"LOST {result['kill']}: {result['reason']}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
