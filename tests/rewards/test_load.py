"""From the name of a reward to the reward."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook.errors import RewardError
from cookbook.rewards import load_reward, score, spec_problem


def value(spec: str, text: str, row: dict[str, object]) -> float:
    return asyncio.run(score(load_reward(spec), text, row, 30.0)).value


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    name = f"rewards_{tmp_path.name.replace('-', '_')}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        "class Judge:\n    def best(self, completion, row):\n        return 2.0\n"
        "judge = Judge()\nlength = lambda completion, row: len(completion)\nnumber = 3\ndef one(completion): pass\n"
    )
    return path


def test_the_ready_rewards_are_known_by_their_names() -> None:
    row: dict[str, object] = {"ground_truth": "7"}
    assert value("exact", "7", row) == value("numeric", "it is 7", row) == value("format:7$", "it is 7", row) == 1.0


def test_a_function_of_the_current_directory_is_found(module: Path) -> None:
    assert value(f"{module.stem}:length", "four", {}) == 4.0
    assert value(f"{module.stem}:judge.best", "", {}) == 2.0


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("absent", "has no attribute 'absent'"),
        ("number", "is int, not a function"),
        ("one", "cannot be called with a completion and a row: too many positional arguments"),
    ],
)
def test_what_is_no_reward_function_is_named(module: Path, attribute: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(f"{module.stem}:{attribute}")


def test_a_module_that_is_not_there_or_fails_is_named(module: Path) -> None:
    with pytest.raises(RewardError, match=r"there is no module 'absent_module'. Start from the folder that holds it"):
        load_reward("absent_module:score")
    module.with_name("broken_reward.py").write_text("import absent_package\n")
    with pytest.raises(RewardError, match="importing broken_reward failed: No module named 'absent_package'"):
        load_reward("broken_reward:score")
    module.with_name("raising_reward.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match="importing raising_reward failed: ZeroDivisionError"):
        load_reward("raising_reward:score")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuntdown", "Did you mean countdown?"),
        ("rewards.py:score", "Write it as a module"),
        ("a:b:c", "there is no reward 'a:b:c'"),
        ("format:(", "is not a regular expression"),
        ("reasoning_gym:", "is not a task"),
        ("reasoning_gym:chain_sum?a", "is not a task"),
        ("reasoning_gym:chain_sum?a=1&a=2", "is not a task"),
    ],
)
def test_the_form_of_a_name_is_checked_without_importing(spec: str, message: str) -> None:
    assert message in str(spec_problem(spec))
    with pytest.raises(RewardError):
        load_reward(spec)


def test_rewards_are_imported_without_what_they_need() -> None:
    code = (
        "import sys, cookbook.rewards; "
        "print({'torch', 'numpy', 'sympy', 'math_verify', 'reasoning_gym', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
