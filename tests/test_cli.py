"""The `cookbook` command: its help, its errors and exit statuses, and the commands that need no Prefect.

`cookbook run` with a real flow is in tests/flows.
"""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cookbook import embedded
from cookbook.checkpoints import CHECKPOINTS_FILE
from cookbook.cli import app
from cookbook.cli.doctor import Check, _package
from cookbook.run import RunDirectory
from tests.tiny_model import make_tiny_model

SENTINEL = "sentinel-key-0123456789"


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("COOKBOOK_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def cookbook(*arguments):
    """Run the command in this process: (exit status, stdout, stderr)."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def in_a_process(*arguments, **environment):
    command = [sys.executable, "-m", "cookbook.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


# Help, version, start-up --------------------------------------------------------------------------------------------


def test_help_names_every_group_and_costs_less_than_half_a_second_of_cpu():
    def cpu_s():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    costs = []
    for _ in range(3):
        before = cpu_s()
        result = in_a_process("--help")
        costs.append(cpu_s() - before)
    assert result.returncode == 0
    for group in ("run", "backend", "models", "data", "checkpoints", "runs", "doctor"):
        assert group in result.stdout
    assert min(costs) < 0.5


def test_importing_the_command_imports_nothing_heavy():
    heavy = {
        "torch",
        "transformers",
        "prefect",
        "wandb",
        "fireworks",
        "numpy",
        "pydantic",
        "yaml",
        "httpx",
        "flows",
        "tasks",
    }
    code = f"import sys, cookbook.cli; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_version_is_that_of_the_package():
    assert cookbook("--version") == (0, "cookbook-flows 0.1.0\n", "")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["run"], ["backend", "start", "--port", "x"], ["run", "sft", "-x"]]
)
def test_a_wrong_command_line_exits_with_2(arguments):
    status, out, err = cookbook(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err


# run: what is wrong shows before anything starts --------------------------------------------------------------------


def test_all_config_problems_are_one_message_on_stderr_and_status_2(home, tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 0\nlearning_rte: 1\n")
    status, out, err = cookbook("run", "sft", "--config", "c.yaml", "--set", "backend=aws", "--json")
    assert (status, out) == (2, "")
    assert err.startswith("error: 6 problems in the config; nothing was provisioned:")
    for where in ("log_path", "base_model", "dataset", "epochs", "learning_rte", "backend"):
        assert f"\n  - {where}: " in err
    assert "Did you mean learning_rate?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "run", "sft"], ["run", "sft", "--debug"]])
def test_debug_shows_the_traceback(home, arguments):
    status, _, err = cookbook(*arguments)
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert "load_config" in err


def test_an_unknown_recipe_names_the_known_ones(home):
    status, _, err = cookbook("run", "sftt")
    assert status == 2
    assert "there is no recipe 'sftt'. Choose one of: sft, rl, dpo, orpo." in err


def test_a_wrong_config_imports_neither_prefect_nor_the_flow(home):
    code = (
        "import sys; from cookbook.cli import app\n"
        "try: app(['run', 'sft', '--set', 'epochs=0'])\n"
        "except SystemExit as end: print(end.code, {'prefect', 'flows', 'tasks', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "2 set()\n"


def test_log_path_on_the_command_line_wins(home, tmp_path):
    (tmp_path / "file").write_text("")
    _, _, err = cookbook("run", "sft", "--set", "log_path=fine", "--log-path", "file")
    assert "log_path: file is a file" in err


# backend ------------------------------------------------------------------------------------------------------------


def test_the_backend_starts_shows_and_stops(home):
    assert cookbook("backend", "status") == (0, "not running\n", "")
    assert cookbook("backend", "stop", "--json") == (0, '{"stopped": false}\n', "")
    status, _, err = cookbook("backend", "logs")
    assert status == 0
    assert "never started here" in err
    try:
        status, out, _ = cookbook("backend", "start", "--json")
        assert status == 0
        started = json.loads(out)
        assert started["running"]
        assert started["base_url"].startswith("http://127.0.0.1:")
        status, shown, _ = cookbook("backend", "status")
        assert f"running at {started['base_url']} (process {started['supervisor_pid']}" in shown
        status, logs, err = cookbook("backend", "logs", "-n", "5")
        assert status == 0
        assert len(logs.splitlines()) <= 5
        token = embedded.token_path(home).read_text().strip()
        assert token not in out + shown + logs + err
        other = str(int(started["base_url"].rpartition(":")[2]) ^ 1)
        status, _, err = cookbook("backend", "start", "--port", other)
        assert status == 1
        assert err.startswith("error: the embedded backend of")
    finally:
        stopped = cookbook("backend", "stop")
    assert stopped == (0, "stopped\n", "")


# models and data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_models_list_shows_what_is_there_and_what_can_be_pulled(home, model):
    status, out, err = cookbook("models", "list")
    assert (status, out) == (0, "")
    assert "cookbook models pull smollm2-135m-instruct" in err
    (home / "models").mkdir(parents=True)
    (home / "models" / "mine").symlink_to(model)
    status, out, _ = cookbook("models", "list", "--json")
    found = json.loads(out)
    assert [entry["name"] for entry in found["models"]] == ["mine"]
    assert found["can_be_pulled"] == ["smollm2-135m-instruct"]
    _, table, _ = cookbook("models", "list")
    assert table.splitlines()[0].split() == ["NAME", "LICENCE", "SIZE", "SOURCE", "FOLDER"]


def test_pulling_an_unknown_model_names_the_known_ones(home):
    status, out, err = cookbook("models", "pull", "gpt-5")
    assert (status, out) == (2, "")
    assert "no model 'gpt-5' in the catalogue" in err
    assert "smollm2-135m-instruct" in err


def test_preview_marks_the_trained_tokens(home, model, tmp_path):
    row = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": []}) + "\n" + json.dumps(row) + "\n")
    status, out, err = cookbook("data", "preview", "rows.jsonl", "--model", str(model), "--row", "1")
    assert (status, err) == (0, "")
    assert "user\n2+2" in out
    assert "[[4<|im_end|>]]" in out
    status, _, err = cookbook(
        "data", "preview", "rows.jsonl", "--model", str(model), "--row", "1", "--max-seq-len", "10"
    )
    assert "dropped: " in err
    everything = ("--train-on-what", "all_messages")
    _, out, _ = cookbook("data", "preview", "rows.jsonl", "--model", str(model), "--row", "1", *everything)
    assert "[[2+2<|im_end|>]]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl does not exist"),
        (["rows.jsonl", "--row", "7"], "--row 7, but rows.jsonl has 1 rows. Give 0 to 0."),
        (["rows.jsonl"], "row 0 of rows.jsonl"),
    ],
)
def test_preview_names_what_is_wrong_with_the_data(home, model, tmp_path, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    status, out, err = cookbook("data", "preview", *arguments, "--model", str(model))
    assert (status, out) == (2, "")
    assert message in err


def test_preview_shows_a_prompt_of_rl_and_what_a_reward_gives(home, model, tmp_path):
    row = {"messages": [{"role": "user", "content": "2+2"}], "ground_truth": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked = ("data", "preview", "rows.jsonl", "--model", str(model))
    status, out, err = cookbook(*asked, "--rl")
    assert (status, err) == (0, "")
    assert "user\n2+2<|im_end|>\n<|im_start|>assistant\n" in out
    assert "tokens of prompt; ground_truth = '4'" in out
    status, out, _ = cookbook(*asked, "--reward", "numeric", "--completion", "It is 4.")
    assert (status, out.splitlines()[-1]) == (0, "-- reward numeric of 'It is 4.': 1, answered 1")
    status, _, err = cookbook(*asked, "--reward", "cuntdown")
    assert (status, err) == (2, "error: there is no reward 'cuntdown'. Did you mean countdown?\n")
    status, _, err = cookbook(*asked, "--reward", "countdown")
    assert status == 2
    assert "row 0 of rows.jsonl has no countdown task" in err


def test_preview_shows_a_row_of_a_procedural_task(home, model):
    task = "reasoning_gym:chain_sum?size=2"
    status, out, _ = cookbook("data", "preview", task, "--rl", "--row", "1", "--model", str(model))
    assert status == 0
    assert "State the final answer" in out
    status, _, err = cookbook("data", "preview", task, "--rl", "--row", "2", "--model", str(model))
    assert (status, err) == (2, f"error: --row 2, but {task} has 2 rows. Give 0 to 1.\n")


def test_preview_shows_both_answers_of_a_pair_after_one_prompt(home, model, tmp_path):
    question = {"role": "user", "content": "2+2"}
    sides = {side: {"messages": [question, {"role": "assistant", "content": side}]} for side in ("chosen", "rejected")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(sides) + "\n" + json.dumps({"chosen": sides["chosen"]}) + "\n")
    asked = ("data", "preview", "rows.jsonl", "--model", str(model))
    status, out, err = cookbook(*asked, "--max-seq-len", "10")
    assert status == 0
    assert out.count("2+2") == 1
    assert "-- chosen:\n[[chosen<|im_end|>]]\n-- rejected:\n[[rejected<|im_end|>]]\n" in out
    assert "dropped: " in err
    status, out, err = cookbook(*asked, "--row", "1")
    assert (status, out) == (2, "")
    assert "row 1 of rows.jsonl is not a pair of answers in one form (keys: ['chosen'])" in err


def test_example_writes_rows_for_every_recipe(home, tmp_path):
    status, out, _ = cookbook("data", "example", str(tmp_path / "rows"), "--train", "5", "--held-out", "3")
    names = [f"{prefix}{part}.jsonl" for prefix in ("", "rl_", "preference_") for part in ("train", "held_out")]
    assert (status, out.splitlines()) == (0, [str(tmp_path / "rows" / name) for name in names])
    assert [len((tmp_path / "rows" / name).read_text().splitlines()) for name in names] == [5, 3] * 3


# checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped_run(home, tmp_path):
    """A run that has stopped after a commit."""
    with RunDirectory.open(tmp_path / "run", recipe="sft", config={"seed": 0}, home=home) as run:
        row = {"name": "step-5", "step": 5, "data_consumed": 1200, "state_path": "cross_job://job/step-5"}
        (run.path / CHECKPOINTS_FILE).write_text(json.dumps(row) + "\n")
        return run.run_id


def test_checkpoints_are_listed_with_what_can_be_done_with_them(stopped_run):
    status, out, _ = cookbook("checkpoints", "list", "run")
    assert status == 0
    header, line = out.splitlines()
    assert header == "NAME    STEP  ROWS   RESUMABLE  PROMOTABLE  SIZE  SAVED  ON BACKEND"
    assert line == "step-5  5     1,200  yes        no          -     -      -"
    _, out, _ = cookbook("checkpoints", "list", "run", "--json")
    assert json.loads(out)[0]["state_path"] == "cross_job://job/step-5"


def test_checkpoints_of_a_folder_that_is_not_there_are_an_error(home):
    status, _, err = cookbook("checkpoints", "list", "absent")
    assert status == 2
    assert "absent is not a run directory" in err


def test_a_damaged_line_of_checkpoints_is_named(stopped_run, tmp_path):
    path = tmp_path / "run" / CHECKPOINTS_FILE
    path.write_text("oops\n" + path.read_text())
    status, out, err = cookbook("checkpoints", "list", "run")
    assert (status, out) == (1, "")
    assert "checkpoints.jsonl, line 1" in err


# doctor -------------------------------------------------------------------------------------------------------------


def test_doctor_checks_everything_and_never_shows_a_key(home, tmp_path):
    environment = {
        "FIREWORKS_API_KEY": SENTINEL,
        "WANDB_API_KEY": SENTINEL,
        "WANDB_MODE": "offline",
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    result = in_a_process("doctor", "--json", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert set(checks) == {"python", "packages", "torch", "home", "backend", "models", "prefect", "fireworks", "wandb"}
    assert "bfloat16" in checks["torch"]["found"]
    assert "GiB free" in checks["home"]["found"]
    assert checks["models"]["state"] == "note"
    assert "key set" in checks["fireworks"]["found"]
    assert "mode offline, key found" in checks["wandb"]["found"]
    assert SENTINEL not in result.stdout + result.stderr


def test_doctor_fails_on_a_prefect_server_that_does_not_answer_and_a_home_that_cannot_be(home, tmp_path):
    (tmp_path / "file").write_text("")
    environment = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    result = in_a_process("doctor", "--home", str(tmp_path / "file" / "home"), **environment)
    assert result.returncode == 1
    lines = {line.split()[1]: line for line in result.stdout.splitlines()}
    assert lines["prefect"].startswith("fail")
    assert "unset PREFECT_API_URL" in lines["prefect"]
    assert lines["home"].startswith("fail")


def test_doctor_says_why_a_known_bad_version_is_one():
    assert _package("pytest", ">=1") is None
    bad = _package("fastapi", "<0.1")
    assert isinstance(bad, Check)
    assert bad.state == "fail"
    assert "needed is <0.1: with fastapi 0.151 and later Prefect's server does not start" in bad.found
    assert "pip install -c constraints.txt" in bad.remedy
    absent = _package("no-such-package-anywhere", "")
    assert absent is not None
    assert absent.found == "not installed"


# Ctrl-C -------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_status_130(home, tmp_path):
    """A pipe as config file keeps the command waiting for it."""
    os.mkfifo(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "cookbook.cli", "run", "sft", "--config", "config.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "config.yaml", "w"):  # opened for writing once the command opens it for reading
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
