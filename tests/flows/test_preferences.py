"""The DPO and ORPO flows end to end on the embedded backend, each run in a process of its own."""

import json
import math
import signal
from pathlib import Path

import pytest

from cookbook import embedded
from tests.flows.helpers import losses, metrics, preference_parameters, run_here, start, wait_for, write_pairs

PAIRS, HELD_OUT, BATCH_SIZE, EPOCHS = 24, 8, 4, 2
STEPS = PAIRS // BATCH_SIZE * EPOCHS


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def held_out_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("held-out") / "pairs.jsonl", HELD_OUT, start=100)


@pytest.fixture(scope="module")
def run_of(environment, tiny_model, pairs_file, held_out_file, tmp_path_factory):
    """Parameters and summary of an undisturbed run of a recipe."""
    done = {}

    def run(recipe):
        if recipe not in done:
            log_path = tmp_path_factory.mktemp(recipe) / "run"
            evaluation = {"dataset": str(held_out_file)}
            parameters = preference_parameters(log_path, tiny_model, pairs_file, epochs=EPOCHS, evaluation=evaluation)
            done[recipe] = parameters, run_here(parameters, environment, recipe)
        return done[recipe]

    return run


def resources(parameters, role):
    """States that the run's resource of this role, or kind, went through."""
    lines = (Path(parameters["log_path"]) / "resources.jsonl").read_text().splitlines()
    return [row["state"] for row in map(json.loads, lines) if role in (row["role"], row["kind"])]


@pytest.mark.parametrize("recipe", ["dpo", "orpo"])
def test_a_run_learns_to_prefer_what_was_chosen(run_of, recipe):
    parameters, summary = run_of(recipe)
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    assert summary["steps"] == STEPS
    assert summary["rows_consumed"] == PAIRS * EPOCHS
    assert after["loss"] < before["loss"]
    assert after["preference_accuracy"] > before["preference_accuracy"]
    for row in metrics(parameters):
        if "train/loss" in row:
            assert {"preference/margin", "preference/accuracy", "preference/chosen_reward"} <= set(row)
            assert row["preference/chosen_tokens"] > 0


def test_dpo_begins_at_ln_2_because_the_untrained_policy_is_the_reference(run_of):
    parameters, summary = run_of("dpo")
    assert summary["evaluation"]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(parameters)[1] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_trainer_is_freed_when_all_logprobs_are_known(run_of):
    parameters, _ = run_of("dpo")
    rows = [json.loads(line) for line in (Path(parameters["log_path"]) / "resources.jsonl").read_text().splitlines()]
    freed = [row["role"] for row in rows if row["state"] == "freed"]
    assert freed == ["reference", "policy"]


def test_a_second_run_on_the_same_data_and_model_needs_no_reference(run_of, environment, tmp_path):
    parameters, _ = run_of("dpo")
    again = {**parameters, "log_path": str(tmp_path / "run")}
    run_here(again, environment, "dpo")
    assert resources(again, "reference") == []
    assert losses(again) == losses(parameters)


@pytest.mark.parametrize("recipe", ["dpo", "orpo"])
def test_a_run_killed_in_epoch_2_resumes_to_the_same_losses(run_of, environment, tmp_path, recipe):
    parameters, summary = run_of(recipe)
    killed = {**parameters, "log_path": str(tmp_path / "run")}
    process = start(killed, environment, recipe)
    # Steps 7 to 12 are epoch 2; saves are after steps 4, 8 and at the end.
    wait_for(lambda: max(losses(killed), default=0) >= 9, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = run_here(killed, environment, recipe)
    assert again["resumed_from_step"] in (8, 12)
    assert losses(killed) == losses(parameters)
    assert again["rows_consumed"] == summary["rows_consumed"]
    assert again["evaluation"] == summary["evaluation"]


def test_a_run_killed_while_references_are_computed_resumes_to_the_same_losses(
    run_of, environment, tiny_model, pairs_file, tmp_path
):
    parameters, _ = run_of("dpo")
    elsewhere = {**environment, "COOKBOOK_HOME": str(tmp_path / "home")}  # where nothing is known
    killed = {**parameters, "log_path": str(tmp_path / "run"), "epochs": 1, "lr_schedule": "constant"}
    try:
        process = start(killed, elsewhere, "dpo")
        wait_for(lambda: max(losses(killed), default=0) >= 1, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        run_here(killed, elsewhere, "dpo")
    finally:
        embedded.stop(tmp_path / "home")
    expected = losses(parameters)
    assert losses(killed) == {step: expected[step] for step in range(1, STEPS // EPOCHS + 1)}
    assert resources(killed, "reference")[-1] == "freed"
    (cache,) = (tmp_path / "home" / "reference_logprobs").glob("*/pairs.jsonl")
    computed = [row["pair"] for row in entries(cache)]
    assert len(computed) == len(set(computed)) == PAIRS + HELD_OUT


def test_ctrl_c_while_references_are_computed_frees_both_trainers_and_keeps_the_cache(
    environment, tiny_model, tmp_path
):
    home = tmp_path / "home"
    pairs = write_pairs(tmp_path / "pairs.jsonl", 200)
    parameters = preference_parameters(tmp_path / "run", tiny_model, pairs, ref_cache_concurrency=2)
    try:
        process = start(parameters, {**environment, "COOKBOOK_HOME": str(home)}, "dpo")
        wait_for(lambda: max(losses(parameters), default=0) >= 1, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        wait_for(lambda: len(list(home.glob("backend/*/jobs/*/exit.json"))) == 2)  # both trainers have ended
        (cache,) = (home / "reference_logprobs").glob("*/pairs.jsonl")
        assert 4 <= len(entries(cache)) <= 200
    finally:
        embedded.stop(home)


def entries(cache):
    return [row for row in map(json.loads, cache.read_text().splitlines()) if "pair" in row]


def test_with_lora_the_base_under_the_adapter_is_the_reference(environment, tiny_model, pairs_file, tmp_path):
    parameters = preference_parameters(tmp_path / "run", tiny_model, pairs_file, lora_rank=4, beta=0.2)
    run_here(parameters, environment, "dpo")
    assert resources(parameters, "reference") == []
    assert losses(parameters)[1] == pytest.approx(math.log(2), abs=1e-6)


def test_weights_are_synced_to_a_deployment_when_asked_to(environment, tiny_model, pairs_file, tmp_path):
    arguments = ["--compute-dtype=float32", "--threads=1"]
    parameters = preference_parameters(
        tmp_path / "run",
        tiny_model,
        pairs_file,
        weight_sync={"weight_sync_interval": 3},
        deployment={"deployment_extra_args": arguments},
    )
    run_here(parameters, environment, "dpo")
    assert resources(parameters, "deployment") == ["intended", "confirmed", "freed"]
    assert [row["step"] for row in metrics(parameters) if "sync/load_s" in row] == [4]  # noted with the next step


def test_the_learning_rate_follows_the_schedule_and_its_warm_up(environment, tiny_model, pairs_file, tmp_path):
    parameters = preference_parameters(
        tmp_path / "run", tiny_model, pairs_file, lr_schedule="linear", warmup_ratio=0.34, min_lr_ratio=0.1
    )
    run_here(parameters, environment, "orpo")
    rates = [row["train/learning_rate"] for row in metrics(parameters) if "train/loss" in row]
    peak = parameters["learning_rate"]
    assert rates == pytest.approx([peak / 3, peak * 2 / 3, peak, peak * 0.775, peak * 0.55, peak * 0.325])


def test_bad_pairs_end_the_run_before_anything_is_provisioned(environment, tiny_model, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    good = [json.loads(line) for line in pairs.read_text().splitlines()]
    equal = {**good[0], "rejected": good[0]["chosen"]}
    unanswered = {**good[1], "rejected": {"messages": good[1]["rejected"]["messages"][:1]}}
    asks = [{"role": "user", "content": "another question"}, *good[2]["rejected"]["messages"][1:]]
    differing = {**good[2], "rejected": {"messages": asks}}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in (good[3], equal, unanswered, differing)))
    parameters = preference_parameters(tmp_path / "run", tiny_model, pairs)
    process = start(parameters, environment, "dpo")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "3 of 4 rows" in err
    assert all(f"row {row}" in err for row in (1, 2, 3))
    assert not (tmp_path / "run" / "resources.jsonl").exists()
