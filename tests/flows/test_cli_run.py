"""`cookbook run` with the real flow: what is printed where, and the exit status of a good, a failed, a stopped run."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.flows.helpers import sft_parameters, write_rows


@pytest.fixture(scope="module")
def environment(prefect_environment, backend_home):
    return {**prefect_environment, "COOKBOOK_HOME": str(backend_home)}


def start(config, environment, *options):
    command = [sys.executable, "-m", "cookbook.cli", "run", "sft", "--config", str(config), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_config(folder, tiny_model, rows, **fields):
    path = folder / "config.yaml"
    path.write_text(json.dumps(sft_parameters(folder / "run", tiny_model, rows, **fields)))
    return path


def test_a_good_run_prints_its_summary_and_says_the_rest_on_stderr(environment, tiny_model, rows_file, tmp_path):
    config = write_config(tmp_path, tiny_model, rows_file)
    process = start(config, environment)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert out.startswith("Run sft-")
    assert "completed" in out.splitlines()[0]
    assert "step 3 of 3: loss" in err
    assert "Pre-flight" in err
    again = start(config, environment, "--json")
    out, err = again.communicate(timeout=150)
    assert again.returncode == 0, err
    assert [json.loads(line)["steps"] for line in out.splitlines()] == [3]


def test_a_damaged_row_ends_the_run_with_2_and_one_message(environment, tiny_model, rows_file, tmp_path):
    with rows_file.open("a") as file:
        file.write('{"messages": [{"role": "user"}]}\n')
    process = start(write_config(tmp_path, tiny_model, rows_file), environment)
    out, err = process.communicate(timeout=150)
    assert (process.returncode, out) == (2, "")
    assert "row 24" in err
    assert "Traceback" not in err
    assert [line[:7] for line in err.splitlines() if line.startswith("error: ")] == ["error: "]


def test_ctrl_c_ends_with_130_and_says_how_to_go_on_and_a_second_owner_is_refused(environment, tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    config = write_config(tmp_path, tiny_model, rows, epochs=400, weight_sync={"dcp_save_interval": 2})
    process = start(config, environment)
    commits = tmp_path / "run" / "checkpoints.jsonl"
    deadline = time.monotonic() + 120
    while not commits.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)

    second = start(config, environment)
    _, err = second.communicate(timeout=90)
    assert second.returncode == 1
    assert f"is owned by process {process.pid}" in err
    assert "Traceback" not in err

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    last_commit = json.loads(commits.read_text().splitlines()[-1])["name"]
    assert f"Interrupted. The same command goes on from checkpoint {last_commit} in {tmp_path / 'run'}.\n" in err
