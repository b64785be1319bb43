"""The RL flow end to end on the embedded backend, each run in a process of its own, as `cookbook run` starts it."""

import json
import signal
from collections import Counter
from pathlib import Path

from tests.flows.helpers import losses, metrics, rl_parameters, run_here, start, wait_for

NUM_PROMPTS = 24
GROUPS_PER_STEP = 4


def commits(parameters):
    lines = (Path(parameters["log_path"]) / "checkpoints.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def recorded_steps(parameters):
    """Steps done -> the recorded lines of the next one."""
    files = sorted((Path(parameters["log_path"]) / "rollouts").glob("step-*.jsonl"))
    texts = {int(file.stem.removeprefix("step-")): file.read_text() for file in files}
    return {step: [json.loads(line) for line in text.splitlines()] for step, text in texts.items()}


def ended_rows(parameters):
    """How often each row was trained or rejected, over all recorded steps."""
    lines = [line for step in recorded_steps(parameters).values() for line in step]
    return Counter(line["row"] for line in lines if line["kind"] in ("group", "rejected"))


def test_a_run_learns_accounts_for_every_row_and_promotes(rl_undisturbed, backend_home):
    parameters, summary = rl_undisturbed
    assert summary["reward"]["last"] > summary["reward"]["first"]
    assert summary["evaluation"]["after"]["reward"] > summary["evaluation"]["before"]["reward"]
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
    last = commits(parameters)[-1]
    assert last["data_consumed"] == NUM_PROMPTS == summary["rows_consumed"]
    assert (last["open_rows"], last["rejected_rows"]) == ([], summary["rows_rejected"])
    assert (backend_home / "models" / f"tiny-{summary['run_id']}" / "config.json").exists()
    assert len(summary["samples"]) == 3
    assert all(sample["before"] != sample["after"] for sample in summary["samples"])


def test_every_step_is_sampled_by_the_weights_before_it(rl_undisturbed):
    parameters, _ = rl_undisturbed
    for step, lines in recorded_steps(parameters).items():
        versions = {c["version"] for line in lines if line["kind"] == "group" for c in line["completions"]}
        assert len(versions) == 1
        expected = "" if step == 0 else f"step-{step}-1-"
        assert versions.pop().startswith(expected)
    first = next(row for row in metrics(parameters) if "train/loss" in row)
    assert first["sampler/logprob_gap_p99"] < 1e-4  # float32 on both sides


def test_a_run_killed_between_two_saves_trains_the_recorded_groups_again(rl_undisturbed, environment, tmp_path):
    parameters = {**rl_undisturbed[0], "log_path": str(tmp_path / "run"), "output_model_id": None}
    process = start(parameters, environment, recipe="rl")
    wait_for(lambda: max(losses(parameters), default=0) >= 3, process)  # saves are at 2 and 4
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen, recorded = losses(parameters), recorded_steps(parameters)
    summary = run_here(parameters, environment, "rl")
    assert summary["resumed_from_step"] in (2, 4)
    assert {step: loss for step, loss in losses(parameters).items() if step in seen} == seen
    after = recorded_steps(parameters)
    assert all(after[step] == recorded[step] for step in recorded)
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
    assert commits(parameters)[-1]["data_consumed"] == NUM_PROMPTS


def test_windows_of_two_steps_lose_no_row_and_sync_every_other_step(environment, tiny_model, prompts_file, tmp_path):
    parameters = rl_parameters(
        tmp_path / "run", tiny_model, prompts_file, weight_sync={"weight_sync_interval": 2, "dcp_save_interval": 1}
    )
    summary = run_here(parameters, environment, "rl")
    assert summary["rows_consumed"] == NUM_PROMPTS
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
    syncs = [row["step"] for row in metrics(parameters) if "sync/load_s" in row]
    assert syncs == [step for step in losses(parameters) if step % 2 == 1 and step > 1]


def test_a_lora_run_with_a_kl_term_and_a_calculator(environment, backend_home, tiny_model, prompts_file, tmp_path):
    parameters = rl_parameters(
        tmp_path / "run",
        tiny_model,
        prompts_file,
        lora_rank=4,
        kl_beta=0.1,
        environment="calculator",
        max_turns=2,
        max_completion_tokens=80,
        max_rows=8,
        policy_loss="gspo",
        advantage="leave_one_out",
        trajectory_dir=str(tmp_path / "trajectories"),
        weight_sync={"dcp_save_interval": 1},
        storage={"keep_last": 1},
    )
    summary = run_here(parameters, environment, "rl")
    assert [row["name"] for row in commits(parameters)] == ["step-2"]
    assert recorded_steps(parameters) == {}  # no restore needs what was sampled before the only checkpoint
    samplers = backend_home.glob(f"checkpoints/{summary['run_id']}-policy-g1/sampler/*")
    assert sorted(path.name[:8] for path in samplers) == [
        "step-1-1",
        "step-2-1",
        commits(parameters)[-1]["sampler_path"][:8],
    ]
    rows = [row for row in metrics(parameters) if "train/loss" in row]
    assert rows[0]["kl/mean"] < 1e-6  # the adapter starts at zero
    assert rows[-1]["kl/mean"] > 1e-6
    assert rows[0]["policy/builtin"] == 0.0
    assert len(list((tmp_path / "trajectories").glob("step-*.jsonl"))) == len(rows)


def test_a_reward_that_fails_in_the_middle_ends_the_run_and_loses_no_row(
    environment, tiny_model, prompts_file, tmp_path
):
    (tmp_path / "broken.flag").touch()
    parameters = rl_parameters(tmp_path / "run", tiny_model, prompts_file, reward="tests.flows.rewards:fails_at_row_9")
    process = start(parameters, {**environment, "REWARD_BROKEN": str(tmp_path / "broken.flag")}, recipe="rl")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ZeroDivisionError" in err
    assert "row 9" in err
    assert "Traceback" not in err
    (tmp_path / "broken.flag").unlink()  # the user mends the reward
    run_here(parameters, {**environment, "REWARD_BROKEN": str(tmp_path / "broken.flag")}, recipe="rl")
    assert ended_rows(parameters) == Counter(range(NUM_PROMPTS))
