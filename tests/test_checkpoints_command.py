"""`cookbook checkpoints` on the real backend: what it lists, makes models of and deletes, and how it refuses."""

import json

import pytest
from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.cli.output import EXIT_FAILED, EXIT_WRONG_INPUT
from cookbook.models.provenance import Provenance, read_provenance, record_path
from cookbook.run import RunDirectory
from cookbook.snapshots import StoredRun
from tests.stopped_run import SIZE, StoppedRun


def cookbook(*arguments, answer=None):
    """Run the command in this process: (exit status, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def checkpoints(*arguments, **options):
    return cookbook("checkpoints", *arguments, **options)


@pytest.fixture
def run(backend, tmp_path, monkeypatch):
    """Commits at steps 1 to 3, of which the second can be promoted, and a delta of a weight sync."""
    monkeypatch.setenv("COOKBOOK_HOME", str(backend.home))
    run = StoppedRun(tmp_path / "run", backend)
    for step, kind in ((1, "state"), (2, "both"), (3, "state")):
        run.commit(step, kind)
    run.write("sampler", "step-3-1-aaaabbbb", checkpoint_type="delta")
    return run


def test_the_list_says_what_can_be_done_how_large_and_whether_it_is_there(run):
    (run.home / "checkpoints" / run.job / "state" / "step-1").rename(run.path / "lost")
    status, out, err = checkpoints("list", run.path)
    assert status == 0
    header, *lines = [line.split() for line in out.splitlines()]
    assert header[:6] == ["NAME", "STEP", "ROWS", "RESUMABLE", "PROMOTABLE", "SIZE"]
    assert lines[0] == ["step-1", "1", "4", "no", "no", "-", "-", "no"]
    assert lines[1][:7] == ["step-2", "2", "8", "yes", "yes", "0.000", "GB"]
    assert lines[2][3:5] == ["yes", "no"]
    assert (lines[1][-1], lines[2][-1]) == ("yes", "yes")
    assert "besides, 1 snapshot that no checkpoint names, 0.000 GB: see prune" in err
    rows = json.loads(checkpoints("list", run.path, "--json")[1])
    assert [row["size_bytes"] for row in rows] == [None, 2 * SIZE, SIZE]
    assert [row["on_backend"] for row in rows] == [False, True, True]
    assert rows[1]["created"].startswith("1970-01-01T00:00:0")
    assert rows[1]["loop_state"]["extra"] == [2]


def test_offline_the_record_alone_is_listed_and_said_so(run, monkeypatch):
    _, out, err = checkpoints("list", run.path, "--offline")
    assert out.splitlines()[2].split() == ["step-2", "2", "8", "yes", "yes", "-", "-", "-"]
    assert err == ""
    record = json.loads((run.path / "run.json").read_text())
    record["config"]["backend"] = "fireworks"
    (run.path / "run.json").write_text(json.dumps(record))
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    status, out, err = checkpoints("list", run.path)
    assert (status, len(out.splitlines())) == (0, 4)
    assert err.startswith("the backend was not asked, this is the run's record alone: ")
    assert "FIREWORKS_API_KEY" in err


def test_the_last_promotable_checkpoint_becomes_a_model_with_its_provenance(run):
    status, out, _ = checkpoints("promote", run.path, "--to", "made-by-default", "--json")
    assert (status, json.loads(out)["model"]) == (0, "accounts/local/models/made-by-default")
    assert json.loads(out)["checkpoint"] == "step-2-0a1b2c3d"
    assert (run.home / "models" / "made-by-default" / "weights").stat().st_size == SIZE
    made = read_provenance(run.home, "made-by-default")
    assert (made.run_id, made.step, made.checkpoint) == (StoredRun.read(run.path).run_id, 2, "step-2")
    assert checkpoints("promote", run.path, "step-2", "--to", "made-by-default")[0] == 0  # the same once more


def test_a_snapshot_of_a_weight_sync_becomes_a_model_with_its_provenance_too(run, backend, tmp_path):
    def made_of_it(model):
        assert checkpoints("promote", run.path, "step-4-1-aaaabbbb", "--to", model)[0] == 0
        return Provenance.from_dict(json.loads(record_path(run.home, model).read_text()))

    run.write("sampler", "step-4-1-aaaabbbb")
    made = made_of_it("of-a-sync")
    assert (made.run_id, made.checkpoint, made.step) == (StoredRun.read(run.path).run_id, "step-4-1", None)
    assert (made.config["base_model"], [link.origin for link in made.parents]) == ("tiny", ["foreign"])
    # Once another run saves in the same trainer, whose a snapshot is cannot be told, nor what it began with.
    StoppedRun(tmp_path / "adopting", backend, policy_job_id=run.job)
    made = made_of_it("of-somebody")
    assert (made.run_id, made.trainer_job, made.licence) == (None, run.job, None)
    assert [link.origin for link in made.parents] == ["unknown", "foreign"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["step-1", "--to", "m"], EXIT_WRONG_INPUT, "'step-1' has no sampler snapshot: it can only be resumed from. "),
        (["step-3-1-aaaabbbb", "--to", "m"], EXIT_WRONG_INPUT, "cannot be promoted: the backend says"),
        (["step-9", "--to", "m"], EXIT_WRONG_INPUT, "is called 'step-9'. These can be promoted: step-2."),
        (["--to", "My_Model"], EXIT_WRONG_INPUT, "--to 'My_Model' is not a model id"),
        (["--to", "tiny"], EXIT_FAILED, "accounts/local/models/tiny exists already, made from"),
    ],
)
def test_what_cannot_be_promoted_is_refused_and_says_what_can(run, arguments, status, words):
    found, out, err = checkpoints("promote", run.path, *arguments)
    assert (found, out) == (status, "")
    assert words in err
    assert not (run.home / "models" / "m").exists()


def test_a_run_without_a_promotable_checkpoint_says_where_they_come_from(run, backend, tmp_path):
    other = StoppedRun(tmp_path / "other", backend)
    other.commit(1)
    status, _, err = checkpoints("promote", other.path, "--to", "m")
    assert status == EXIT_WRONG_INPUT
    assert "has a sampler snapshot. None of this run can: a run saves one at its end (save_final_checkpoint)" in err


def test_a_dry_run_shows_what_a_prune_then_deletes_after_a_question(run):
    before = run.there()
    status, out, _ = checkpoints("prune", run.path, "--keep-last", "1", "--dry-run")
    assert (status, run.there(), run.rows()) == (0, before, ["step-1", "step-2", "step-3"])
    assert out.splitlines()[-1] == "to delete: 1 checkpoint (2 snapshots), 0.000 GB"
    assert "step-2        keep: the last promotable one" in out
    status, _, err = checkpoints("prune", run.path, "--keep-last", "1", answer="n\n")
    assert (status, run.there()) == (1, before)
    assert "Delete 0.000 GB? It cannot be restored." in err
    status, out, _ = checkpoints("prune", run.path, "--keep-last", "1", answer="y\n")
    assert (status, out.splitlines()[-1]) == (0, "freed 0.000 GB: 1 checkpoint (2 snapshots)")
    assert run.there() == ["sampler/step-2-0a1b2c3d", "state/step-2", "state/step-3"]


def test_what_the_mirror_goes_on_from_is_not_pruned(run):
    (run.path / "upkeep.json").write_text(json.dumps({"mirror": {"commit": "step-1"}}))
    planned = json.loads(checkpoints("prune", run.path, "--keep-last", "1", "--dry-run", "--json")[1])
    assert (planned["checkpoints"], planned["kept"]["step-1"]) == ([], "in use")
    assert checkpoints("prune", run.path, "--keep-last", "1", "--yes")[0] == 0
    assert (run.rows(), "state/step-1" in run.there()) == (["step-1", "step-2", "step-3"], True)


def test_a_prune_in_json_is_one_object(run):
    status, out, err = checkpoints("prune", run.path, "--keep-last", "1", "--yes", "--json")
    assert (status, err) == (0, "")
    done = json.loads(out)
    assert (done["checkpoints"], done["freed_bytes"], done["num_deleted"], done["left"]) == (
        ["step-1"],
        2 * SIZE,
        2,
        [],
    )
    planned = json.loads(checkpoints("prune", run.path, "--keep-last", "1", "--dry-run", "--json")[1])
    assert (planned["dry_run"], planned["snapshots"], list(planned["kept"])) == (True, [], ["step-2", "step-3"])


@pytest.mark.parametrize("options", [["--yes"], ["--dry-run"]])
def test_a_live_run_is_not_pruned(run, options):
    stored, before = StoredRun.read(run.path), run.there()
    with RunDirectory.open(run.path, recipe=stored.recipe, config=stored.config, home=run.home):
        status, out, err = checkpoints("prune", run.path, "--keep-last", "1", *options)
    assert (status, out, run.there()) == (EXIT_FAILED, "", before)
    assert "is running. Wait for it or stop it, then prune." in err


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    for command in (["promote", tmp_path, "--to", "m"], ["prune", tmp_path, "--keep-last", "1"]):
        status, _, err = checkpoints(*command)
        assert status == EXIT_WRONG_INPUT
        assert "is not a run directory. `cookbook runs list` names" in err
