"""The run directory: lease, fence, config and data of a resumed run, progress, resources, the list of runs."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from cookbook.config import RECIPE_CONFIGS, SFTConfig
from cookbook.errors import CheckpointError, ConfigError, LeaseLost
from cookbook.files import append_jsonl
from cookbook.ledger import ResourceLedger, read_resources
from cookbook.run import (
    CHECKPOINTS_FILE,
    FREE_FIELDS,
    Progress,
    RunDirectory,
    list_runs,
    numbers_fingerprint,
)
from cookbook.summary import RunSummary


def config_of(tmp_path, **fields):
    values = {"log_path": str(tmp_path / "run"), "base_model": "tiny", "dataset": "rows.jsonl", **fields}
    return SFTConfig(**values).model_dump(mode="json")


def open_run(tmp_path, **fields):
    return RunDirectory.open(
        tmp_path / "run", recipe="sft", config=config_of(tmp_path, **fields), home=tmp_path / "home"
    )


def commit(tmp_path, step=2):
    row = {"name": f"step-{step}", "step": step, "state_path": f"cross_job://job/step-{step}"}
    append_jsonl(tmp_path / "run" / CHECKPOINTS_FILE, row)


def start_holder(tmp_path):
    """Another process that owns the run until it is killed."""
    code = """
import json, sys, time
from pathlib import Path
from cookbook.run import RunDirectory
tmp = Path(sys.argv[1])
config = json.loads(sys.argv[2])
run = RunDirectory.open(tmp / "run", recipe="sft", config=config, home=tmp / "home")
print(run.epoch, flush=True)
time.sleep(60)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), json.dumps(config_of(tmp_path))]
    holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip().isdigit()
    return holder


def end(holder):
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_the_run_id_is_made_once_and_the_epoch_grows_with_each_owner(tmp_path):
    with open_run(tmp_path) as run:
        first = run.run_id
        assert first.startswith("sft-")
        assert len(first) == len("sft-") + 8
        assert run.user_metadata() == {"cookbook_run": first, "cookbook_epoch": "1"}
    with open_run(tmp_path) as run:
        assert (run.run_id, run.epoch) == (first, 2)


def test_importing_it_loads_neither_torch_nor_the_sdk():
    code = "import sys, cookbook.run; print([m for m in ('torch', 'fireworks', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_second_process_is_refused_with_the_pid_of_the_first_until_that_is_killed(tmp_path):
    holder = start_holder(tmp_path)
    try:
        with pytest.raises(LeaseLost, match=rf"process {holder.pid} on .+, since 20\d\d-"):
            open_run(tmp_path)
        assert [run.state for run in list_runs(tmp_path / "home")] == ["running"]
    finally:
        holder.send_signal(signal.SIGKILL)
        end(holder)
    with open_run(tmp_path) as run:
        assert run.epoch == 2


def test_an_owner_that_lost_its_lock_without_noticing_cannot_write(tmp_path):
    old = open_run(tmp_path)
    (tmp_path / "run" / ".lock").unlink()  # what a file system that forgets locks amounts to
    with open_run(tmp_path) as new:
        with pytest.raises(LeaseLost, match=r"epoch 2, this process has 1") as lost, old.guard():
            pass
        assert str(os.getpid()) in str(lost.value)
        with pytest.raises(LeaseLost):
            old.pin_data("f")
        with pytest.raises(LeaseLost):
            ResourceLedger(old).intend("trainer", "policy", 1)
        with new.guard():
            pass
    assert read_resources(tmp_path / "run") == []
    old.close()


def test_a_closed_run_writes_nothing(tmp_path):
    run = open_run(tmp_path)
    run.close()
    with pytest.raises(LeaseLost, match="closed"):
        run.pin_data("f")


def test_a_renewed_run_has_the_next_epoch_and_the_one_before_writes_nothing(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    later = run.renewed()
    assert (later.run_id, later.epoch) == (run.run_id, 2)
    later.pin_data("f")
    with pytest.raises(LeaseLost, match="closed"):
        run.pin_data("f")
    run.close()  # the lock is the later one's
    with pytest.raises(LeaseLost, match="owned by process"):
        open_run(tmp_path)

    monkeypatch.setattr("cookbook.run.write_json", full_disk)
    with pytest.raises(CheckpointError, match="full"):
        later.renewed()
    monkeypatch.undo()
    later.pin_data("f")
    later.close()


def full_disk(path, value):
    raise CheckpointError(f"{path} cannot be written: the disk is full.")


def test_before_the_first_commit_config_and_data_may_change(tmp_path):
    with open_run(tmp_path, lora_rank=4) as run:
        run.pin_data("one")
    with open_run(tmp_path, lora_rank=8) as run:
        run.pin_data("two")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["lora_rank"] == 8


def test_after_a_commit_fields_that_change_the_numbers_are_refused_all_at_once(tmp_path):
    open_run(tmp_path).close()
    commit(tmp_path, step=4)
    with pytest.raises(ConfigError) as refused:
        open_run(tmp_path, learning_rate=1e-3, batch_size=7, seed=1, adam={"beta2": 0.9}, step_timeout=5)
    found = {problem.where: problem.what for problem in refused.value.problems}
    assert set(found) == {"learning_rate", "batch_size", "seed", "adam.beta2"}
    assert found["batch_size"].startswith("is 7, but run sft-")
    assert "started with 32 and has a commit at step 4" in found["batch_size"]
    with open_run(tmp_path) as run:
        assert run.epoch == 2  # a refused start took no lease


def test_after_a_commit_deadlines_and_sinks_may_change(tmp_path):
    open_run(tmp_path).close()
    commit(tmp_path)
    changed = {
        "dataset": "moved.jsonl",
        "step_timeout": 9,
        "wandb": {"project": "p"},
        "retry": {"attempts": 2},
        "evaluation": {"dataset": "held.jsonl"},
        "infra": {"trainer_timeout_s": 60, "extra_args": ["--threads=1"]},
        "weight_sync": {"dcp_save_interval": 3, "dcp_timeout": 7},
        "output_model_id": "m",
    }
    open_run(tmp_path, **changed).close()


def test_every_free_field_is_a_field_of_some_recipe():
    names = set().union(*(names_of(config) for config in RECIPE_CONFIGS.values()))
    assert [name for name in FREE_FIELDS if name not in names] == []


def names_of(config):
    names = set()
    for name, entry in config.model_fields.items():
        names.add(name)
        if hasattr(entry.annotation, "model_fields"):
            names.update(f"{name}.{inner}" for inner in entry.annotation.model_fields)
    return names


def test_changed_data_is_refused_once_there_is_a_commit(tmp_path):
    with open_run(tmp_path) as run:
        run.pin_data("one")
    commit(tmp_path, step=6)
    with open_run(tmp_path) as run:
        run.pin_data("one")
        with pytest.raises(CheckpointError, match=r"commit at step 6: fingerprint two, was one"):
            run.pin_data("two")


def test_another_recipe_is_refused(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match="recipe 'sft', this is 'dpo'"):
        RunDirectory.open(tmp_path / "run", recipe="dpo", config={}, home=tmp_path / "home")


def test_a_copied_run_directory_is_refused_and_a_moved_one_is_not(tmp_path):
    open_run(tmp_path).close()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"copy is a copy of .*run"):
        RunDirectory.open(tmp_path / "copy", recipe="sft", config=config_of(tmp_path), home=tmp_path / "home")
    shutil.rmtree(tmp_path / "run")
    with RunDirectory.open(tmp_path / "copy", recipe="sft", config=config_of(tmp_path), home=tmp_path / "home") as run:
        assert list_runs(tmp_path / "home")[0].path == run.path


def test_commits_without_a_run_file_are_nobodys(tmp_path):
    open_run(tmp_path).close()
    commit(tmp_path)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"has a commit at step 2 but no run\.json"):
        open_run(tmp_path)


def test_a_log_path_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"log_path .*file/run cannot be made"):
        RunDirectory.open(tmp_path / "file" / "run", recipe="sft", config={}, home=tmp_path / "home")


def test_opening_cuts_a_torn_commit_and_refuses_a_bad_one(tmp_path, caplog):
    open_run(tmp_path).close()
    commit(tmp_path)
    checkpoints = tmp_path / "run" / CHECKPOINTS_FILE
    whole = checkpoints.read_bytes()
    checkpoints.write_bytes(whole + b'{"name": "step-4", "st')
    open_run(tmp_path).close()
    assert checkpoints.read_bytes() == whole
    assert "cut a torn last line of 22 bytes" in caplog.text
    checkpoints.write_bytes(b"?\n" + whole)
    with pytest.raises(CheckpointError, match=r"checkpoints\.jsonl, line 1"):
        open_run(tmp_path)


def test_runs_are_listed_with_their_state(tmp_path):
    assert list_runs(tmp_path / "home") == []
    with open_run(tmp_path) as run:
        assert run.summary() is None
        summary = RunSummary(
            run_id=run.run_id,
            recipe="sft",
            status="completed",
            log_path=str(run.path),
            base_model="tiny",
            steps=4,
            epochs=1,
            rows_consumed=32,
            trained_tokens=99,
            resumed_from_step=None,
            train_seconds=1.5,
            tokens_per_second=66.0,
            final_loss=1.25,
            evaluation={"after": {"loss": 1.5}},
        )
    assert [entry.state for entry in list_runs(tmp_path / "home")] == ["stopped"]
    with open_run(tmp_path) as run:
        run.finish(summary)
        assert run.summary() == summary
    assert [(entry.run_id, entry.state) for entry in list_runs(tmp_path / "home")] == [(run.run_id, "finished")]
    shutil.rmtree(tmp_path / "run")
    assert [entry.state for entry in list_runs(tmp_path / "home")] == ["gone"]


def test_progress_survives_the_loop_state(tmp_path):
    progress = Progress(5, 1, 16, 40, permutation_seed=7, total_steps=9, rejected_rows=2, trained_tokens=1234)
    assert Progress.from_loop_state({**progress.to_loop_state(), "later": "field"}) == progress


@pytest.mark.parametrize("bad", [None, -1, True, 1.5, "3"])
def test_a_loop_state_without_a_usable_number_is_refused(bad):
    state = Progress(5, 1, 16, 40, permutation_seed=7, total_steps=9).to_loop_state()
    with pytest.raises(CheckpointError, match=rf"'position' as a whole number >= 0, got {bad!r}"):
        Progress.from_loop_state({**state, "position": bad})
    del state["position"]
    with pytest.raises(CheckpointError, match=r"'position'.*got nothing"):
        Progress.from_loop_state(state)


def test_resources_are_known_before_they_exist_and_by_generation(tmp_path):
    with open_run(tmp_path) as run:
        ledger = ResourceLedger(run)
        assert ledger.current("policy") is None
        first = ledger.intend("trainer", "policy", 1, spec="abc")
        assert first.resource_id == f"{run.run_id}-policy-g1"
        assert ledger.current("policy") == first
        ledger.confirm(first)
        ledger.freed(first)
        second = ledger.intend("trainer", "policy", 2)
        ledger.intend("trainer", "reference", 1)
        assert ledger.current("policy") == second
        assert [(r.role, r.generation, r.state, r.spec) for r in ledger.all()] == [
            ("policy", 1, "freed", "abc"),
            ("policy", 2, "intended", ""),
            ("reference", 1, "intended", ""),
        ]
    assert read_resources(tmp_path / "run") == ledger.all()


def test_a_resource_row_that_lacks_a_field_is_named(tmp_path):
    open_run(tmp_path).close()
    append_jsonl(tmp_path / "run" / "resources.jsonl", {"resource_id": "x"})
    with pytest.raises(CheckpointError, match=r"resources\.jsonl, row 1 lacks \['kind', 'role'"):
        read_resources(tmp_path / "run")


def test_the_fingerprint_of_the_numbers_follows_pinned_fields_and_data_only():
    config = {"learning_rate": 1.0, "wandb": {"project": None}, "deployment": {"tokenizer_model": None, "region": "a"}}
    same = {**config, "wandb": {"project": "p"}, "deployment": {"tokenizer_model": None, "region": "b"}}
    assert numbers_fingerprint(config, "d") == numbers_fingerprint(same, "d") != numbers_fingerprint(config, "e")
    for other in ({"learning_rate": 2.0}, {"deployment": {"tokenizer_model": "t", "region": "a"}}):
        assert numbers_fingerprint(config | other, "d") != numbers_fingerprint(config, "d")
