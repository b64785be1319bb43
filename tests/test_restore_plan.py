"""What starting a run again would do: from the start, from a commit, nothing, or an error; and with which resources."""

from dataclasses import replace

import pytest

from cookbook.checkpoints import CheckpointRow
from cookbook.ledger import ResourceRecord
from cookbook.restore_plan import BackendView, DiskRecord, RecordedStep, Wanted, plan_restore
from cookbook.run import Progress
from cookbook.snapshots import snapshots_of

NOT_ASKED = BackendView("embedded", problem="it does not run")
PROGRESS = Progress(40, 1, 320, 1320, permutation_seed=0, total_steps=100)
POLICY = Wanted("trainer", "policy")


def commit(progress=PROGRESS, **fields):
    name = f"step-{progress.step}"
    values = {"state_path": f"cross_job://sft-1f2e-policy-g1/{name}", "loop_state": progress.to_loop_state(), **fields}
    return CheckpointRow(name, progress.step, progress.data_consumed, **values)


def run(*commits, recipe="sft", **fields):
    return DiskRecord("sft-1f2e", recipe, is_finished=False, commits=commits, **fields)


def trainer(state="confirmed", generation=1, role="policy", kind="trainer"):
    return ResourceRecord(f"sft-1f2e-{role}-g{generation}", kind, role, generation, state, spec="")


def told(record, backend=NOT_ASKED):
    return " ".join(plan_restore(record, backend).sentences)


def test_a_run_goes_on_at_the_row_of_its_last_commit_and_says_what_runs_again():
    plan = plan_restore(run(commit(replace(PROGRESS, step=20)), commit(), last_step=47), NOT_ASKED)
    assert (plan.action, plan.checkpoint, plan.step, plan.total_steps) == ("resume", "step-40", 40, 100)
    assert (plan.epoch, plan.row, plan.repeated_steps) == (2, 320, 7)
    assert plan.sentences == (
        "It would go on after step 40 of 100, at row 320 of epoch 2, from checkpoint step-40.",
        "Steps 41 to 47, which ran after it, would run again, with the same numbers.",
    )


def test_a_commit_that_can_only_be_promoted_is_no_place_to_go_on_from():
    promotable = commit(replace(PROGRESS, step=50), state_path=None, sampler_path="step-50-0a1b2c3d")
    assert plan_restore(run(commit(), promotable), NOT_ASKED).checkpoint == "step-40"


def test_a_run_without_a_commit_starts_at_row_0_with_the_weights_of_its_config():
    assert "it would start at row 0, with the weights of base_model" in told(run())
    plan = plan_restore(run(config={"init_from_checkpoint": "job-a:step-9"}, last_step=3), NOT_ASKED)
    assert (plan.action, plan.repeated_steps) == ("start", 3)
    assert "the weights of init_from_checkpoint job-a:step-9 and a fresh optimizer" in plan.sentences[0]
    assert plan.sentences[1] == "Steps 1 to 3 would run again, with the same numbers."


def test_a_run_whose_steps_are_all_committed_only_does_what_follows_them():
    assert "it would only do what follows the last one" in told(run(commit(replace(PROGRESS, step=100))))


def test_a_finished_run_does_nothing_unless_its_record_is_damaged():
    finished = replace(run(commit()), is_finished=True)
    assert plan_restore(finished, NOT_ASKED).action == "nothing"
    damaged = replace(finished, damage=("checkpoints.jsonl, line 2 is not a JSON object.",))
    assert plan_restore(damaged, NOT_ASKED).problems == ("checkpoints.jsonl, line 2 is not a JSON object.",)


def test_a_commit_that_the_backend_lacks_is_passed_over_and_an_error_where_there_is_no_other():
    rows = (commit(replace(PROGRESS, step=20)), commit())
    everything = [ref for row in rows for ref in snapshots_of(row)]
    assert plan_restore(run(*rows), BackendView("embedded", snapshots=everything)).action == "resume"
    plan = plan_restore(run(*rows), BackendView("embedded", snapshots=everything[:1]))
    assert (plan.action, plan.checkpoint, plan.passed_over) == ("resume", "step-20", ("step-40",))
    assert plan.sentences[0] == "Checkpoint step-40 is not on the backend, or not whole. It would be passed over."
    plan = plan_restore(run(*rows), BackendView("embedded", snapshots=[]))
    assert plan.action == "fail"
    assert plan.problems[0].startswith("Checkpoints step-20, step-40 are not on the backend, or not whole.")


def test_a_commit_of_another_program_is_an_error_that_says_what_it_lacks():
    plan = plan_restore(run(commit(loop_state={"step": 40, "data_consumed": 1})), NOT_ASKED)
    assert plan.action == "fail"
    assert "needs 'epoch'" in plan.problems[0]


def test_recorded_groups_are_trained_again_as_far_as_they_follow_upon_the_commit():
    recorded = tuple(RecordedStep(step, num_groups=4) for step in (39, 40, 41, 42, 44))
    plan = plan_restore(run(commit(), recipe="rl", recorded=lambda progress: recorded, last_step=47), NOT_ASKED)
    assert (plan.recorded_steps, plan.recorded_groups, plan.repeated_steps) == (3, 12, 7)
    assert plan.sentences[2] == (
        "12 recorded groups of steps 41 to 43 would be trained as they were; what follows would be sampled."
    )
    assert "None of their groups are recorded" in told(run(commit(), recipe="rl", last_step=47))


def test_open_rows_of_rl_are_sampled_first_and_rows_are_counted_over_the_whole_run():
    record = run(commit(replace(PROGRESS, open_rows=(7, 9))), recipe="rl")
    assert "at row 320, from checkpoint step-40. 2 earlier rows would be sampled first." in told(record)


@pytest.mark.parametrize(
    ("state", "action", "text"),
    [
        ("RUNNING", "use", "is running and would be used"),
        ("CREATING", "use", "is creating and would be used"),
        ("CANCELLED", "resume", "is cancelled and would be resumed"),
        ("FAILED", "resume", "has failed and would be resumed"),
        ("DELETED", "make", "is deleted, generation 2 would be made"),
        (None, "make", "is gone, generation 2 would be made"),
    ],
)
def test_a_trainer_is_used_resumed_or_followed_by_the_next_generation(state, action, text):
    record = run(wanted=(POLICY,), resources=(trainer(),))
    plan = plan_restore(record, BackendView("embedded", states={"sft-1f2e-policy-g1": state}))
    assert plan.resources[0].action == action
    assert plan.sentences[-1] == f"Trainer sft-1f2e-policy-g1 {text}."


@pytest.mark.parametrize(
    ("state", "action"), [("READY", "use"), ("FAILED", "make"), ("SCALED_TO_ZERO", "make"), ("DELETED", "make")]
)
def test_a_deployment_that_has_ended_is_never_resumed(state, action):
    record = run(wanted=(Wanted("deployment", "sampler"),), resources=(trainer(role="sampler", kind="deployment"),))
    view = BackendView("embedded", states={"sft-1f2e-sampler-g1": state})
    assert plan_restore(record, view).resources[0].action == action


def test_the_newest_generation_counts_and_a_freed_one_is_followed_by_the_next():
    record = run(wanted=(POLICY,), resources=(trainer("freed", 2), trainer("freed", 1)))
    assert "Trainer sft-1f2e-policy-g2 was deleted, generation 3 would be made." in told(record)


def test_a_trainer_that_was_only_asked_for_is_made_under_its_id():
    record = run(wanted=(POLICY,), resources=(trainer("intended"),))
    view = BackendView("embedded", states={"sft-1f2e-policy-g1": None})
    assert "was asked for and is not there, it would be made" in told(record, view)


def test_without_an_answer_of_the_backend_both_ways_are_named():
    record = run(wanted=(POLICY,), resources=(trainer(),))
    assert plan_restore(record, NOT_ASKED).resources[0].action == "find"
    assert "would be resumed if it can be, else generation 2 would be made" in told(record)
    assert "A trainer would be made." in told(run(wanted=(POLICY,)))


def test_what_the_config_adopts_is_never_made_and_what_may_not_be_needed_says_so():
    record = run(wanted=(replace(POLICY, adopted="shared-job"), Wanted("trainer", "reference", is_certain=False)))
    text = told(record, BackendView("embedded", states={"shared-job": "CANCELLED"}))
    assert "Trainer shared-job, which is not the run's own, is cancelled and would be resumed." in text
    assert "A reference trainer would be made, if it is still needed." in text


def test_an_evaluation_goes_on_with_what_is_missing():
    assert "not answered yet" in told(run(recipe="eval"))
