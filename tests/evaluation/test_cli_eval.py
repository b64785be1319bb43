"""`cookbook eval` before anything runs: where the config comes from, and how wrong input leaves it."""

import json
import re

import pytest
from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.cli.eval import ENTRY_POINTS
from cookbook.evaluation.report import EvaluationReport
from tests.tiny_model import make_tiny_model

CONFIGS = []


class Flow:
    """Stands where the installed flow stands: keeps the config and gives a report."""

    name = "eval"

    def load(self):
        def flow(config):
            CONFIGS.append(config)
            return EvaluationReport(
                "eval-1", config.log_path, config.dataset, 1, 1, 0.0, 0.95, config.models, {"model": {}}
            )

        return flow


@pytest.fixture
def call(tmp_path, monkeypatch):
    make_tiny_model(tmp_path / "models" / "tiny")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    monkeypatch.setenv("COOKBOOK_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    points = {ENTRY_POINTS: [Flow()]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points[group])
    CONFIGS.clear()
    return lambda *arguments: CliRunner().invoke(app, ["eval", *arguments])


def test_options_stand_over_the_file_and_the_result_is_one_line_of_json(call, tmp_path):
    (tmp_path / "eval.yaml").write_text(
        '{"log_path": "from-file", "dataset": "rows.jsonl", "seed": 3, "reward": "math"}'
    )
    options = ["--config", "eval.yaml", "--reward", "format:a", "--samples", "4", "--pass-at", "1", "--pass-at", "4"]
    done = call("tiny", *options, "--set", "seed=5", "--json")
    assert done.exit_code == 0, done.output
    (config,) = CONFIGS
    assert (config.model, config.log_path, config.reward, config.seed) == ("tiny", "from-file", "format:a", 5)
    assert (config.samples_per_row, config.pass_at) == (4, [1, 4])
    assert json.loads(done.stdout)["run_id"] == "eval-1"


def test_a_run_directory_stands_for_the_model_that_the_run_promoted(call, tmp_path):
    for name, summary in (("done", {"model": "accounts/local/models/tiny"}), ("none", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"run_id": "sft-1"}')
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert call("done", "--dataset", "rows.jsonl").exit_code == 0
    assert CONFIGS[0].model == "accounts/local/models/tiny"
    assert CONFIGS[0].log_path.startswith("runs/eval-done-")
    refused = call("tiny", "--dataset", "rows.jsonl", "--against", "none")
    assert (refused.exit_code, "has promoted no model" in refused.stderr) == (2, True)


def test_without_a_log_path_each_evaluation_gets_a_folder_of_its_own(call):
    assert call("tiny", "--dataset", "rows.jsonl").exit_code == 0
    assert re.fullmatch(r"runs/eval-tiny-\d{8}-\d{6}", CONFIGS[0].log_path)


def test_wrong_input_is_named_all_at_once_with_exit_status_2(call):
    done = call("nope", "--dataset", "none.jsonl", "--against", "neither", "--reward", "exct", "--pass-at", "2")
    assert done.exit_code == 2
    for where in ("model: ", "against: ", "dataset: ", "reward: ", "pass_at: "):
        assert f"- {where}" in done.stderr
    assert CONFIGS == []
