"""What the fault suites counted, as tables for benchmarks/RESULTS.md: `python -m tests.faults.report FOLDER`.

The exit status is 1 when something was lost, or when the flow was not killed at each phase boundary in some cell.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.points import PHASES, points_of

__all__ = ["kill_table", "prefect_table", "proxy_table", "unreached_points"]


def kill_table(cells: Sequence[dict[str, Any]]) -> str:
    """A line for each recipe and seed: kills by process, lost ones, those that were planned and found nothing to kill,
    and how the runs came out."""
    names = ("flow", "trainer", "reference", "deployment", "control-plane", "supervisor")
    head = ("recipe, seed", *names, "kills", "lost", "not reached", "runs", "identical", "minutes")
    rows = [head, tuple("---" for _ in head)]
    for cell in cells:
        by = Counter(result["kill"].partition("@")[0] for result in cell["results"])
        counts = (sum(by[name] for name in names), len(_lost(cell)), len(cell["unreached"]))
        ends = (*counts, cell["runs"], cell["identical"], round(cell["seconds"] / 60, 1))
        rows.append((f"{cell['recipe']}, {cell['seed']}", *(str(by[name]) for name in names), *map(str, ends)))
    total = sum(len(cell["results"]) for cell in cells)
    lost = sum(len(_lost(cell)) for cell in cells)
    return f"{_markdown(rows)}\n\n{total} kills below Prefect, {total - lost} survived, {lost} lost."


def prefect_table(report: dict[str, Any]) -> str:
    """A line for what was killed and how the run was brought on."""
    rows = [("killed, brought on by", "tried", "survived", "lost"), ("---",) * 4]
    ways = sorted(report["ways"].items())
    rows += [(way, *(str(count.get(name, 0)) for name in ("tried", "survived", "lost"))) for way, count in ways]
    return f"{_markdown(rows)}\n\n{report['kills']} kills through Prefect."


def proxy_table(report: dict[str, Any]) -> str:
    """A line for each endpoint."""
    rows = [("endpoint", "tried", "survived", "lost", "kinds of faults"), ("---",) * 5]
    for name, counts in report["endpoints"].items():
        numbers = (str(counts[key]) for key in ("tried", "survived", "lost"))
        rows.append((name, *numbers, str(len(counts["faults"]))))
    return (
        f"{_markdown(rows)}\n\n{report['tried']} injected faults, {report['survived']} survived, {report['lost']} lost."
    )


def unreached_points(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Phase boundaries at which the flow was killed in no cell."""
    reached = {result["kill"].rpartition(":")[0] for cell in cells for result in cell["results"]}
    return [point for point in points_of(PHASES) if f"flow@{point}" not in reached]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lost(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in cell["results"] if not result["survived"]]


def main() -> int:
    folder = Path(sys.argv[1])
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("kills-*.json"))]
    print(kill_table(cells))
    lost = [f"LOST {result['kill']}: {result['reason']}" for cell in cells for result in _lost(cell)]
    lost += [f"the flow was never killed at {point}" for point in unreached_points(cells)]
    for name, table in (("prefect-kills", prefect_table), ("proxy", proxy_table)):
        path = folder / f"{name}.json"
        report = json.loads(path.read_text()) if path.exists() else None
        print(f"\n{table(report)}" if report else f"\n{path} is missing")
        lost += [f"LOST {problem}" for problem in report.get("problems", ())] if report else [f"{path} is missing"]
        lost += [f"LOST {run['recipe']} {run['seed']}: {run['problems']}" for run in _disturbed(report)]
    print("\n".join(lost))
    return 1 if lost else 0


def _disturbed(report: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [run for run in (report or {}).get("runs", ()) if run["problems"]]


if __name__ == "__main__":
    sys.exit(main())
