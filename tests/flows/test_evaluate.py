"""The evaluation flow end to end on the embedded backend, as `cookbook eval` starts it: two models, side by side."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fireworks.training.sdk import DeploymentConfig

from cookbook.config import Environment
from cookbook.control_plane import connect
from cookbook.models.export import card_of
from cookbook.models.provenance import read_provenance
from cookbook.run import list_runs
from tests.flows.helpers import command_here, wait_for
from tests.tiny_model import make_tiny_adapter, make_tiny_model
from tests.wire.deployment_process import write_model_snapshot

NUM_ROWS = 6
ARGUMENTS = ["--compute-dtype=float32", "--threads=1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows with a reference answer, all but the last one."""
    told = [
        {
            "messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}."}],
            "number": n,
        }
        for n in range(NUM_ROWS)
    ]
    told[-1]["messages"].pop()
    path = tmp_path_factory.mktemp("evaluation") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


@pytest.fixture(scope="module")
def other_model(tiny_model, backend_home):
    """A LoRA adapter of the tiny model, with a record of its own."""
    folder = make_tiny_adapter(backend_home / "models" / "other", base=tiny_model)
    (folder / "model.json").write_text(json.dumps({"source": "somewhere"}))
    return folder


def command(model, rows, log_path, *options, **fields):
    config = Path(log_path).with_suffix(".yaml")
    fields = {"deployment": {"deployment_extra_args": ARGUMENTS}, "max_completion_tokens": 8, **fields}
    config.write_text(json.dumps(fields))
    given = [str(model), "--dataset", str(rows), "--config", str(config), "--log-path", str(log_path), "--json"]
    return [sys.executable, "-m", "cookbook.cli", "eval", *given, *options]


def run(call, environment, expect=0):
    """What the command gives, in this process: the report, or what it says on stderr."""
    status, out, err = command_here(call[call.index("eval") :], environment)
    assert status == expect, f"{out}\n{err}"
    return json.loads(out.splitlines()[-1]) if expect == 0 else err


def deployments(home):
    with connect("embedded", Environment(home=home, fireworks_base_url="")) as control:
        return control.list_deployments()


@pytest.fixture(scope="module")
def compared(environment, tiny_model, other_model, rows, tmp_path_factory):
    """An evaluation of two models: its command and its report."""
    folder = tmp_path_factory.mktemp("compared")
    options = ["--against", str(other_model), "--reward", "tests.flows.rewards:vowels", "--samples", "3"]
    call = command(tiny_model, rows, folder / "run", *options, "--pass-at", "1", "--pass-at", "2", pass_threshold=0.2)
    return call, run(call, environment), folder / "run"


def test_two_models_are_compared_row_by_row_and_everything_is_written_down(compared, backend_home):
    _, report, folder = compared
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(NUM_ROWS))
    assert all(len(line["answers"][role]) == 3 for line in lines for role in ("model", "against"))
    assert {"loss", "reward", "pass@1", "pass@2"} <= set(report["measures"]["against"]) == set(report["difference"])
    assert report["measures"]["model"]["loss"]["num_rows"] == NUM_ROWS - 1  # the last row has no reference answer
    rewards = [[answer["reward"] for answer in line["answers"]["model"]] for line in lines]
    mean = sum(map(sum, rewards)) / (3 * NUM_ROWS)
    assert report["measures"]["model"]["reward"]["value"] == pytest.approx(mean)
    wins = [value for line in lines for value in line["wins"]]
    assert report["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert sum(report["outcomes"].values()) == 3 * NUM_ROWS
    assert {run.path: run.state for run in list_runs(backend_home)}[folder] == "finished"
    assert deployments(backend_home) == []


def test_the_numbers_are_on_the_card_of_a_model_that_has_a_record(compared, backend_home, rows):
    report = compared[1]
    (told,) = read_provenance(backend_home, "other").evaluations
    assert (told["run_id"], told["measures"]) == (report["run_id"], report["measures"]["against"])
    assert told["data_fingerprint"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    assert f"| {report['measures']['against']['loss']['value']:.4f} | [" in card_of("other", backend_home)[1]
    assert [path.name for path in (backend_home / "provenance").glob("*.json")] == ["other.json"]  # not of the folder


def test_again_with_the_same_log_path_gives_the_result_at_once_and_with_another_config_an_error(compared, environment):
    call, report, folder = compared
    written = (folder / "evaluation.json").stat().st_mtime_ns
    assert run(call, environment) == report
    assert (folder / "evaluation.json").stat().st_mtime_ns == written
    assert "seed: is 1, but" in run([*call, "--set", "seed=1"], environment, expect=2)
    other_dtype = [*call, "--set", "deployment.deployment_extra_args=[--compute-dtype=bfloat16]"]
    assert "deployment.deployment_extra_args: is" in run(other_dtype, environment, expect=2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_the_losses_are_those_of_the_model_and_of_the_adapter_in_float32(compared, tiny_model, other_model, rows):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from cookbook.data.rendering import Renderer
    from cookbook.models import load_tokenizer

    renderer = Renderer(load_tokenizer(str(tiny_model), Path("/nonexistent")), "last_assistant_message")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert compared[1]["measures"]["model"]["loss"]["value"] == pytest.approx(loss_of(model, renderer, rows), abs=1e-4)
    adapted = PeftModel.from_pretrained(model, other_model)
    found = compared[1]["measures"]["against"]["loss"]["value"]
    assert found == pytest.approx(loss_of(adapted, renderer, rows), abs=1e-4)


def loss_of(model, renderer, rows):
    """Nats a token of the reference answers."""
    import torch

    nats, count = 0.0, 0
    for line in rows.read_text().splitlines()[:-1]:
        rendered = renderer.render(json.loads(line), "a row")
        tokens = torch.tensor(rendered.tokens[None].astype("int64"))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0, :-1].double(), dim=-1)
        picked = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
        nats -= float((picked * torch.tensor(rendered.weights[1:])).sum())
        count += rendered.num_trained
    return nats / count


def test_an_evaluation_that_was_killed_goes_on_with_the_answers_that_are_missing(
    environment, tiny_model, rows, tmp_path, backend_home
):
    """One request at a time, so that the kill comes between two answers."""
    fields = {"concurrency": {"mode": "fixed", "max_concurrency": 1}, "max_completion_tokens": 200}
    fields |= {"samples_per_row": 4, "reward": "tests.flows.rewards:vowels"}
    call = command(tiny_model, rows, tmp_path / "run", **fields)
    file = tmp_path / "run" / "answers-model.jsonl"
    process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: file.exists() and len(file.read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = file.read_text().rpartition("\n")[0]
    killed = run(call, environment)
    assert file.read_text().startswith(kept)
    undisturbed = run(command(tiny_model, rows, tmp_path / "other", **fields), environment)
    assert killed["measures"] == undisturbed["measures"]
    assert deployments(backend_home) == []


def numbered_rows(path, *numbers):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}], "number": n} for n in numbers]
    for row in rows[:2]:
        row["messages"].append({"role": "assistant", "content": "a"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ONE_BY_ONE = {"concurrency": {"mode": "fixed", "max_concurrency": 1}, "retry": {"attempts": 1}}


def test_answers_of_a_model_that_was_replaced_are_neither_mixed_nor_lost(environment, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    shutil.copytree(model, tmp_path / "first")
    rows = numbered_rows(tmp_path / "rows.jsonl", 1, 2, 3, 9)
    call = command(model, rows, tmp_path / "run", **ONE_BY_ONE, reward="tests.flows.rewards:fails_at_row_9")
    (tmp_path / "broken").touch()
    environment = environment | {"REWARD_BROKEN": str(tmp_path / "broken")}
    assert "ZeroDivisionError" in run(call, environment, expect=1)
    (tmp_path / "broken").unlink()
    kept = (tmp_path / "run" / "answers-model.jsonl").read_bytes()
    assert len(kept.splitlines()) == 4

    make_tiny_model(model, seed=1)
    told = run(call, environment, expect=2)
    assert "weights: is" in told
    assert "answers-model.jsonl was made with" in told
    assert (tmp_path / "run" / "answers-model.jsonl").read_bytes() == kept

    shutil.copytree(tmp_path / "first", model, dirs_exist_ok=True)
    run(call, environment)
    make_tiny_model(model, seed=1)
    assert "have changed since the evaluation" in run(call, environment, expect=2)


@pytest.fixture
def by_hand(environment, backend_home, tiny_model):
    """A deployment of somebody's with two snapshots to load: loads one of them. It is there with the first."""
    for seed, name in enumerate(("step-1", "step-2"), start=1):
        folder = backend_home / "checkpoints"
        write_model_snapshot(folder, name, job="by-hand", seed=seed, base_model=str(tiny_model))
    with connect("embedded", Environment(home=backend_home, fireworks_base_url="")) as control:
        wanted = DeploymentConfig(
            "by-hand",
            str(tiny_model),
            accelerator_type="CPU",
            min_replica_count=1,
            extra_args=ARGUMENTS,
            hot_load_trainer_job="accounts/local/rlorTrainerJobs/by-hand",
        )
        control.deployments.create_or_get(wanted)
        control.deployments.wait_for_ready("by-hand", timeout_s=60)

        def load(name):
            assert control.deployments.hotload_and_wait("by-hand", str(tiny_model), name, timeout_seconds=60)

        load("step-1")
        yield load
        control.delete_deployment("by-hand")
        shutil.rmtree(backend_home / "checkpoints" / "by-hand")


def test_an_adopted_deployment_is_measured_with_one_snapshot_which_the_report_names(
    by_hand, environment, tiny_model, tmp_path
):
    rows = numbered_rows(tmp_path / "rows.jsonl", 1, 2, 3, 9)
    fields = {**ONE_BY_ONE, "deployment": {"deployment_id": "by-hand"}}
    call = command(tiny_model, rows, tmp_path / "run", **fields, reward="tests.flows.rewards:fails_at_row_9")
    (tmp_path / "broken").touch()
    environment = environment | {"REWARD_BROKEN": str(tmp_path / "broken"), "BY_HAND_MODEL": str(tiny_model)}
    assert "ZeroDivisionError" in run(call, environment, expect=1)
    (tmp_path / "broken").unlink()

    by_hand("step-2")
    told = run(call, environment, expect=2)
    assert "serves snapshot step-2 now, and was measured with snapshot step-1" in told

    by_hand("step-1")
    assert run(call, environment)["versions"] == {"model": "step-1"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert {answer["version"] for line in lines for answer in line["answers"]["model"]} == {"step-1"}

    meanwhile = command(tiny_model, rows, tmp_path / "other", **fields, reward="tests.flows.rewards:hot_loads_at_row_2")
    told = run(meanwhile, environment, expect=2)
    assert "serves snapshot step-2 now, and was measured with snapshot step-1" in told
    _, *answers = (tmp_path / "other" / "answers-model.jsonl").read_text().splitlines()
    assert {json.loads(answer)["version"] for answer in answers} == {"step-1"}


def test_without_a_reward_only_the_loss_is_measured(environment, tiny_model, tmp_path):
    rows = numbered_rows(tmp_path / "rows.jsonl", 1, 2)
    report = run(command(tiny_model, rows, tmp_path / "run", max_completion_tokens=510), environment)
    assert list(report["measures"]["model"]) == ["loss"]
    assert "no answers were sampled" in report["notes"][0]
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answers"] for line in lines] == [{"model": []}] * 2


def test_a_judge_that_fails_ends_the_evaluation_and_frees_the_models(environment, tiny_model, other_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hm?"}]}) + "\n")
    call = command(
        tiny_model,
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        against=str(other_model),
        judge="tests.flows.rewards:judge_of_empty_answers",
    )
    assert "judge" in run(call, environment, expect=1)
    assert deployments(Path(environment["COOKBOOK_HOME"])) == []


def test_a_row_that_is_too_long_is_an_error_before_anything_is_deployed(environment, tiny_model, rows, tmp_path):
    fields = {"max_completion_tokens": 510, "reward": "tests.flows.rewards:vowels"}
    told = run(command(tiny_model, rows, tmp_path / "run", **fields), environment, expect=2)
    assert "line 1) has a prompt of" in told
    assert "6 of 6 rows" in told
    assert not (tmp_path / "run" / "resources.jsonl").exists()
