"""State resumes bit for bit, damaged or foreign checkpoints are refused, exported weights give the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook.backend.decoder import dithered
from cookbook.backend.snapshots import SnapshotInUse, delete_snapshot, load_manifest
from cookbook.backend.trainer import operations
from cookbook.errors import CheckpointError, RequestRejected
from tests.backend.trainer_job import TrainerJob, datum, same
from tests.tiny_model import make_tiny_model

DATA = [datum("the quick brown fox"), datum("jumps", [0.5, -1.0, 0.0, 2.0])]
TOKENS_NT = torch.tensor([[104, 101, 108, 108, 111, 258, 10, 65]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def rank(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def job(tmp_path: Path, tiny: Path, rank: int) -> TrainerJob:
    return TrainerJob(tmp_path, tiny, lora_rank=rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_is_bit_identical(tmp_path: Path, tiny: Path, rank: int, dtype: str) -> None:
    spec = {"lora_rank": rank, "extra_args": [f"--compute-dtype={dtype}"]}
    job = TrainerJob(tmp_path, tiny, **spec)
    model = job.create(rank)
    job.train(model, DATA, 3)
    assert job.run("save_weights", model, path="step-3") == {"path": "step-3", "type": "save_weights"}
    job.train(model, DATA, 3)
    resumed_job = TrainerJob(tmp_path, tiny, "job-b", **spec)  # another process of another job
    resumed = resumed_job.create(rank, seed=99)
    resumed_job.run("load_weights", resumed, path="cross_job://job-a/step-3", optimizer=True)
    resumed_job.train(resumed, DATA, 3)
    assert same(resumed_job.weights(resumed), job.weights(model))
    manifest = load_manifest(job.checkpoints / "state" / "step-3")
    assert (manifest.step, manifest.metadata["compute_dtype"]) == (3, dtype)


def test_load_without_optimizer_starts_fresh_moments(job: TrainerJob, rank: int) -> None:
    model = job.create(rank)
    job.train(model, DATA, 2)
    job.run("save_weights", model, path="step-2")
    saved = job.weights(model)
    job.train(model, DATA, 1)
    job.run("load_weights", model, path="step-2", optimizer=False)
    assert same(job.weights(model), saved)
    optimizer = job.store.use(model).optimizer
    assert (optimizer.steps, optimizer.moments()) == (0, {})


def test_load_drops_gradients_taken_at_other_weights(job: TrainerJob, rank: int) -> None:
    model = job.create(rank)
    job.run("save_weights", model, path="start")
    job.forward_backward(model, DATA)
    job.run("load_weights", model, path="start", optimizer=True)
    with pytest.raises(RequestRejected, match="without a gradient"):
        job.step(model)


def test_save_does_not_disturb_training(job: TrainerJob, rank: int) -> None:
    one, other = job.create(rank), job.create(rank)
    for model in (one, other):
        job.forward_backward(model, DATA)
        if model == other:
            job.run("save_weights", model, path="midway")
            job.run("save_weights_for_sampler", model, path="midway", checkpoint_type="base")
        job.step(model)
    assert same(job.weights(one), job.weights(other))


def test_damaged_checkpoint_is_refused_and_changes_nothing(job: TrainerJob, rank: int) -> None:
    model = job.create(rank)
    job.run("save_weights", model, path="step-0")
    weights = next((job.checkpoints / "state" / "step-0").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    job.train(model, DATA, 1)
    before = job.weights(model)
    with pytest.raises(CheckpointError, match=rf"{weights.name} is damaged: sha256"):
        job.run("load_weights", model, path="step-0", optimizer=True)
    assert same(job.weights(model), before)


def test_a_checkpoint_cannot_be_deleted_while_it_is_loaded(job: TrainerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    model = job.create(job.store.spec.lora_rank)
    job.run("save_weights", model, path="step-0")
    folder = job.checkpoints / "state" / "step-0"
    refused = []

    def delete_then_verify(*arguments: object) -> None:
        with pytest.raises(SnapshotInUse):
            delete_snapshot(folder)
        refused.append(arguments)

    monkeypatch.setattr(operations, "verify", delete_then_verify)
    job.run("load_weights", model, path="step-0", optimizer=True)
    assert refused
    delete_snapshot(folder)


def test_checkpoint_name_is_never_used_twice(job: TrainerJob, rank: int) -> None:
    model = job.create(rank)
    job.run("save_weights", model, path="step-1")
    with pytest.raises(CheckpointError, match="'step-1' exists already"):
        job.run("save_weights", model, path="step-1")


@pytest.mark.parametrize("name", ["Step_1", "a/b", "", "-a", "a" * 64])
def test_state_names_that_clients_cannot_load_are_refused(tmp_path: Path, tiny: Path, name: str) -> None:
    job = TrainerJob(tmp_path, tiny)
    with pytest.raises(RequestRejected, match="lower-case letters"):
        job.run("save_weights", job.create(), path=name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no-such", "no checkpoint 'no-such'"),
        ("cross_job://no-job/step-1", "no checkpoint 'step-1'"),
        ("cross_job://job-a/../x", "cannot be used"),
        ("cross_job://job-a", "cannot be used"),
    ],
)
def test_unknown_checkpoints_are_named(tmp_path: Path, tiny: Path, path: str, message: str) -> None:
    job = TrainerJob(tmp_path, tiny)
    with pytest.raises(CheckpointError, match=message):
        job.run("load_weights", job.create(), path=path, optimizer=False)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path, tiny: Path) -> None:
    full, small = TrainerJob(tmp_path, tiny), TrainerJob(tmp_path, tiny, "job-b", lora_rank=4)
    full.run("save_weights", full.create(), path="full")
    with pytest.raises(CheckpointError, match="state checkpoint of lora_rank 0, this model wants state of lora_rank 4"):
        small.run("load_weights", small.create(4), path="cross_job://job-a/full")
    small.run("save_weights", small.create(4), path="everything")
    with pytest.raises(CheckpointError, match="does not fit this model: 12 weights differ"):
        small.run("load_weights", small.create(4, train_attn=True, train_mlp=False), path="everything")


def test_reference_has_no_weights_of_its_own(job: TrainerJob) -> None:
    reference = job.create_reference()
    for kind in ("save_weights", "load_weights", "save_weights_for_sampler"):
        with pytest.raises(RequestRejected, match=f"{kind} on a base_only reference"):
            job.run(kind, reference, path="x")


def test_forward_only_job_loads_trained_weights(tmp_path: Path, tiny: Path, job: TrainerJob, rank: int) -> None:
    model = job.create(rank)
    job.train(model, DATA, 2)
    job.run("save_weights", model, path="step-2")
    scorer = TrainerJob(tmp_path, tiny, "job-f", lora_rank=rank, forward_only=True)
    loaded = scorer.create(rank)
    scorer.run("load_weights", loaded, path="cross_job://job-a/step-2", optimizer=True)
    assert scorer.forward(loaded, DATA)["metrics"] == job.forward(model, DATA)["metrics"]


def logits_of(job: TrainerJob, model_id: str) -> torch.Tensor:
    decoder = job.store.use(model_id).decoder
    with torch.no_grad():
        return decoder.logits(decoder.hidden_states(TOKENS_NT))


def test_full_sampler_snapshot_is_a_folder_that_transformers_loads(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    job.train(model, DATA, 3)
    answer = job.run("save_weights_for_sampler", model, path="s1-0a1b2c3d", checkpoint_type="base")
    assert answer["path"] == "s1-0a1b2c3d"
    folder = job.checkpoints / "sampler" / "s1-0a1b2c3d"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for name, weight in loaded.state_dict().items():
        trained = job.weights(model).get(name)
        assert trained is None or torch.equal(weight, dithered(trained)), name
    with torch.no_grad():
        assert torch.allclose(loaded.float()(TOKENS_NT).logits, logits_of(job, model), atol=0.1)
    assert AutoTokenizer.from_pretrained(folder)("hi")["input_ids"] == [104, 105]
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_lora_sampler_snapshot_is_a_folder_that_peft_loads_with_the_same_logits(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny, lora_rank=4)
    model = job.create(4, alpha=16)
    job.train(model, DATA, 3)
    job.run("save_weights_for_sampler", model, path="s1")
    folder = job.checkpoints / "sampler" / "s1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about the tied head and about names that transformers renames
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    with torch.no_grad():
        got = loaded(TOKENS_NT).logits
        base = AutoModelForCausalLM.from_pretrained(tiny)(TOKENS_NT).logits
    assert torch.allclose(got, logits_of(job, model), atol=1e-5)
    assert not torch.allclose(got, base, atol=0.1)
    manifest = load_manifest(folder)
    assert (manifest.lora_rank, manifest.checkpoint_type, manifest.promotable, manifest.step) == (4, "base", True, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unembed", [True, False])
def test_merged_snapshot_is_a_whole_model_with_the_adapter_inside(
    tmp_path: Path, tied: bool, unembed: bool, dtype: str
) -> None:
    tiny = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    job = TrainerJob(tmp_path, tiny, lora_rank=4, extra_args=[f"--compute-dtype={dtype}"])
    model = job.create(4, train_unembed=unembed)
    job.train(model, DATA, 3)
    job.run("save_weights_for_sampler", model, path="merged", checkpoint_type="merged_base", export_precision="bf16")
    folder = job.checkpoints / "sampler" / "merged"
    # An adapted head no longer equals the embedding, and a reader that ties the two would lose it.
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is (tied and not unembed)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        got = loaded(TOKENS_NT).logits
    expected = logits_of(job, model)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_loaded_adapter_gives_the_logits_of_the_exported_one(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny, lora_rank=4)
    model = job.create(4)
    job.train(model, DATA, 3)
    job.run("save_weights_for_sampler", model, path="s1")
    folder = job.checkpoints / "sampler" / "s1"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(folder)
    other = job.create(4, seed=5)
    for path in (str(folder), "accounts/local/models/mine"):
        answer = job.run("load_adapter", other, adapter_path=path)
        assert answer == {"model_id": other, "adapter_path": path, "type": "load_adapter"}
        assert same(job.weights(other), job.weights(model))
        job.train(other, DATA, 1)


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny, lora_rank=4)
    model = job.create(4, alpha=8)
    job.run("save_weights_for_sampler", model, path="s1")
    folder = str(job.checkpoints / "sampler" / "s1")
    with pytest.raises(RequestRejected, match=r"lora_alpha / r = 2\.0, this model 4\.0"):
        job.run("load_adapter", job.create(4, alpha=16), adapter_path=folder)
    with pytest.raises(RequestRejected, match="layers differ in presence or shape"):
        job.run("load_adapter", job.create(4, alpha=8, train_mlp=False), adapter_path=folder)
    with pytest.raises(RequestRejected, match="is not a PEFT folder"):
        job.run("load_adapter", model, adapter_path=str(tmp_path))
    with pytest.raises(RequestRejected, match="or an absolute folder of this machine, got 'gs://bucket/x'"):
        job.run("load_adapter", model, adapter_path="gs://bucket/x")


def test_delta_needs_an_earlier_snapshot_and_is_a_full_copy(tmp_path: Path, tiny: Path) -> None:
    job = TrainerJob(tmp_path, tiny)
    model = job.create()
    with pytest.raises(RequestRejected, match="delta needs an earlier sampler snapshot"):
        job.run("save_weights_for_sampler", model, path="s1", checkpoint_type="delta")
    job.run("save_weights_for_sampler", model, path="s1", checkpoint_type="base")
    job.train(model, DATA, 1)
    job.run("save_weights_for_sampler", model, path="s2", checkpoint_type="delta")
    folder = job.checkpoints / "sampler" / "s2"
    assert (load_manifest(folder).checkpoint_type, load_manifest(folder).promotable) == ("delta", False)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_type": "full"}, "one of base, delta, merged_base, got 'full'"),
        ({"checkpoint_type": "merged_base"}, "merged_base is for LoRA models"),
        ({"export_precision": "nvfp4"}, "export_precision must be source or bf16, got 'nvfp4'"),
        ({"path": None}, "path must be str, got None"),
    ],
)
def test_bad_sampler_saves_are_refused(tmp_path: Path, tiny: Path, fields: dict[str, str], message: str) -> None:
    job = TrainerJob(tmp_path, tiny)
    with pytest.raises(RequestRejected, match=message):
        job.run("save_weights_for_sampler", job.create(), **({"path": "s1"} | fields))
