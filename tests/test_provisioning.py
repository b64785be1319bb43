"""The trainer of a run on the real backend: made, found again, resumed, replaced, released; and models out of it."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fireworks.training.sdk import AdamParams

from cookbook.checkpoints import save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.config import Environment, SFTConfig
from cookbook.data.datums import datum_from_row
from cookbook.deadlines import Deadline
from cookbook.errors import ConfigError, LeaseLost, ModelError, ProvisioningError
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import ControlPlane, connect, promote, provision_trainer, release_trainer, wire_model
from cookbook.run import RunDirectory
from tests.hostile import HostileTrainer
from tests.wire.conftest import MODEL

SHAPE = "accounts/local/trainingShapes/cpu-lora"
QUICK = ["--compute-dtype=float32", "--threads=1"]


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture
def run(tmp_path, control):
    with RunDirectory.open(tmp_path / "run", recipe="sft", config={}, home=tmp_path / "home") as run:
        yield run
        for record in ResourceLedger(run).all():
            control.delete(record.resource_id)


@pytest.fixture
def ledger(run):
    return ResourceLedger(run)


def config_of(infra=None, **fields):
    infra = {"extra_args": QUICK, **(infra or {})}
    return SFTConfig(log_path="unused", base_model="tiny", dataset="unused", lora_rank=4, infra=infra, **fields)


def provision(control, ledger, config=None, timeout_s=60):
    return provision_trainer(control, ledger, config or config_of(), deadline=Deadline(timeout_s))


def worker_pid(control, trainer):
    return control.job(trainer.job_id)["metadata"]["workerPid"]


def test_a_trainer_is_written_down_made_and_found_again(control, ledger, run):
    trainer = provision(control, ledger)
    assert trainer.job_id == f"{run.run_id}-policy-g1"
    assert trainer.job_name == f"accounts/local/rlorTrainerJobs/{trainer.job_id}"
    assert (trainer.base_model, trainer.max_context_length, trainer.generation) == (MODEL, 512, 1)
    assert trainer.base_url == control.trainer_url(trainer.job_id)
    assert [record.state for record in ledger.all()] == ["confirmed"]
    pid = worker_pid(control, trainer)
    assert provision(control, ledger) == trainer
    assert worker_pid(control, trainer) == pid
    assert trainer.job_id in {job["name"].rsplit("/")[-1] for job in control.list_jobs()}


def test_a_cancelled_trainer_is_resumed(control, ledger):
    trainer = provision(control, ledger)
    release_trainer(control, ledger, trainer, delete=False)
    assert control.job(trainer.job_id)["state"] == "JOB_STATE_CANCELLED"
    assert provision(control, ledger) == trainer
    assert control.job(trainer.job_id)["state"] == "JOB_STATE_RUNNING"


def test_a_killed_trainer_is_resumed(control, ledger):
    trainer = provision(control, ledger)
    pid = worker_pid(control, trainer)
    os.kill(pid, signal.SIGKILL)
    assert provision(control, ledger) == trainer
    assert worker_pid(control, trainer) != pid


def test_after_a_deletion_comes_the_next_generation(control, ledger, run):
    trainer = provision(control, ledger)
    release_trainer(control, ledger, trainer, delete=True)
    assert control.job(trainer.job_id)["state"] == "JOB_STATE_DELETED"
    assert [record.state for record in ledger.all()] == ["freed"]
    second = provision(control, ledger)
    control.delete(second.job_id)  # by somebody else, so not in the ledger
    third = provision(control, ledger)
    assert [second.job_id, third.job_id] == [f"{run.run_id}-policy-g2", f"{run.run_id}-policy-g3"]
    assert [record.state for record in ledger.all()] == ["freed", "freed", "confirmed"]


def test_a_trainer_that_cannot_be_resumed_is_replaced(control, ledger, backend):
    trainer = provision(control, ledger)
    control.cancel(trainer.job_id)
    tiny = backend.home / "models" / "tiny"
    hidden = tiny.rename(tiny.with_name("tiny-hidden"))
    try:
        assert control.resume(trainer.job_id) is None
        with pytest.raises(ModelError, match="tiny"):
            provision(control, ledger)
    finally:
        hidden.rename(tiny)
    assert provision(control, ledger) == trainer


@pytest.mark.parametrize("created", [False, True])
def test_a_process_that_died_while_creating_leaves_nothing_behind(control, ledger, created):
    trainer = provision(control, ledger)
    release_trainer(control, ledger, trainer, delete=True)
    spec = ledger.current("policy").spec
    intended = ledger.intend("trainer", "policy", 2, spec)
    if created:
        from fireworks.training.sdk import TrainerJobConfig

        request = TrainerJobConfig(MODEL, 4, requested_job_id=intended.resource_id, extra_args=QUICK)
        control.jobs.create(request)
    assert provision(control, ledger).job_id == intended.resource_id
    assert [(record.generation, record.state) for record in ledger.all()] == [(1, "freed"), (2, "confirmed")]


def test_other_infra_gives_another_trainer_and_frees_the_old_one(control, ledger):
    first = provision(control, ledger)
    second = provision(control, ledger, config_of({"extra_args": ["--compute-dtype=float32", "--threads=2"]}))
    assert second.generation == 2
    assert control.job(first.job_id)["state"] == "JOB_STATE_DELETED"
    deadlines = config_of({"extra_args": ["--compute-dtype=float32", "--threads=2"], "trainer_timeout_s": 9})
    assert provision(control, ledger, deadlines) == second


def test_a_shape_decides_the_context_length(control, ledger):
    assert control.shape_context(SHAPE) == 4096
    trainer = provision(control, ledger, config_of({"training_shape_id": SHAPE}))
    assert trainer.max_context_length == 512  # the model's, which is the shorter one
    assert control.job(trainer.job_id)["trainingShape"].startswith(SHAPE)
    with pytest.raises(ConfigError, match=r"max_seq_len: is 5000, but training shape .* at most 4096 tokens"):
        provision(control, ledger, config_of({"training_shape_id": SHAPE}, max_seq_len=5000))


def test_a_shape_that_does_not_exist_or_suit_is_refused_in_the_backends_words(control, ledger):
    with pytest.raises(ProvisioningError, match=r"training shape 'accounts/local/trainingShapes/none' failed"):
        provision(control, ledger, config_of({"training_shape_id": "accounts/local/trainingShapes/none"}))
    with pytest.raises(ProvisioningError, match="POLICY_TRAINER"):
        provision(control, ledger, config_of({"training_shape_id": "accounts/local/trainingShapes/cpu-full"}))


def test_a_failed_trainer_says_why(control, ledger):
    with pytest.raises(ProvisioningError, match=r"JOB_STATE_FAILED: .*--nonsense"):
        provision(control, ledger, config_of({"extra_args": ["--nonsense"]}))
    assert provision(control, ledger).generation == 2  # mended in the config


def test_a_model_that_is_not_there_provisions_nothing(control, ledger):
    config = config_of().model_copy(update={"base_model": "no-such-model"})
    with pytest.raises(ModelError, match="no-such-model"):
        provision(control, ledger, config)
    assert ledger.all() == []


def test_a_superseded_owner_does_not_touch_the_trainer(control, ledger, run):
    trainer = provision(control, ledger)
    (run.path / ".lock").unlink()
    home = run.path.parent / "home"
    with RunDirectory.open(run.path, recipe="sft", config={}, home=home) as successor:
        with pytest.raises(LeaseLost):
            release_trainer(control, ledger, trainer, delete=True)
        assert control.job(trainer.job_id)["state"] == "JOB_STATE_RUNNING"
        release_trainer(control, ResourceLedger(successor), trainer, delete=True)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora_rank", "kind"), [(0, "HF_BASE_MODEL"), (4, "HF_PEFT_ADDON")])
def test_a_snapshot_becomes_a_model_once(control, ledger, run, lora_rank, kind):
    trainer = provision(control, ledger, config_of().model_copy(update={"lora_rank": lora_rank}))
    with ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model, lora_rank) as client:
        row = [datum_from_row([1, 2, 3], [0, 1, 1])]
        client.train_step(row, "cross_entropy", AdamParams(learning_rate=1e-3))
        paths = [
            save_checkpoint(client, f"step-{n}", run.path, {"step": n, "data_consumed": n}, "sampler") for n in (1, 2)
        ]
    release_trainer(control, ledger, trainer, delete=True)

    def promoted(snapshot, model_id=f"tuned-{lora_rank}"):
        return promote(
            control,
            job_id=trainer.job_id,
            snapshot_name=snapshot,
            output_model_id=model_id,
            base_model=trainer.base_model,
            timeout_s=60,
        )

    model = promoted(paths[0]["sampler_path"])
    assert model.name == f"accounts/local/models/tuned-{lora_rank}"
    assert model.kind == kind
    assert list(model.folder.glob("*.safetensors"))
    assert promoted(paths[0]["sampler_path"]) == model
    with pytest.raises(ProvisioningError, match=rf"(?s)output_model_id 'tuned-{lora_rank}' failed.*exists already"):
        promoted(paths[1]["sampler_path"])
    with pytest.raises(ProvisioningError, match=r"(?s)promoting nothing-1.*no checkpoint 'nothing-1'"):
        promoted("nothing-1")


def test_base_models_have_a_name_on_the_wire(backend, tmp_path):
    models = backend.home / "models"
    assert wire_model("tiny", "embedded", models) == MODEL
    assert wire_model(MODEL, "embedded", models) == MODEL
    assert wire_model(str(models / "tiny"), "embedded", models) == MODEL
    outside = tmp_path / "outside"
    outside.symlink_to(models / "tiny")
    assert wire_model(str(models / "tiny"), "embedded", tmp_path) == str(models / "tiny")
    assert wire_model("accounts/a/models/m", "fireworks", models) == "accounts/a/models/m"
    with pytest.raises(ConfigError, match="base_model: 'qwen' is not a model resource"):
        wire_model("qwen", "fireworks", models)


# -- connecting --------------------------------------------------------------------------------------------------------


def environment(home, key=None):
    return Environment(home=Path(home), fireworks_base_url="http://127.0.0.1:9", fireworks_api_key=key)


def test_fireworks_needs_a_key(tmp_path):
    with pytest.raises(ConfigError, match="FIREWORKS_API_KEY: is not set"):
        connect("fireworks", environment(tmp_path))
    with connect("fireworks", environment(tmp_path, "fw-secret")) as control:
        assert control.base_url == "http://127.0.0.1:9"
        assert "fw-secret" not in repr(control)
    with connect("fireworks", environment(tmp_path), api_key="fw-other") as control:
        assert control.jobs.api_key == "fw-other"


def test_a_wrong_key_is_refused_and_never_shown(backend, caplog):
    caplog.set_level(logging.DEBUG)
    with ControlPlane("embedded", backend.base_url, "wrong-secret", backend.home / "models") as stranger:
        for call in (
            lambda: stranger.job("x"),
            lambda: stranger.cancel("x"),
            lambda: stranger.shape_context(SHAPE),
        ):
            with pytest.raises(ProvisioningError, match="401") as refused:
                call()
            assert (refused.value.__cause__, refused.value.__context__) == (None, None)
            assert "wrong-secret" not in str(refused.value) + caplog.text


def test_the_embedded_backend_starts_on_first_use_also_behind_a_proxy(tmp_path):
    code = """
import sys
from pathlib import Path
from cookbook import embedded
from cookbook.config import environment
from cookbook.provisioning import connect

with connect("embedded", environment()) as control:
    print(control.list_jobs(), control.account_id(5), control.job("none"))
embedded.stop(environment().home)
"""
    nowhere = "http://127.0.0.1:9"
    proxies = {"HTTP_PROXY": nowhere, "http_proxy": nowhere, "ALL_PROXY": nowhere}
    kept = {name: value for name, value in os.environ.items() if name.upper() != "NO_PROXY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **proxies, "COOKBOOK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[] local None\n", done.stderr


# -- a backend that does not come to the point ---------------------------------------------------------------------------


@pytest.fixture
def slow():
    trainer = HostileTrainer()
    trainer.behave["rlorTrainerJobs"] = lambda body: (200, {"name": "accounts/local/rlorTrainerJobs/x"})
    yield trainer
    trainer.close()


def assert_late(slow, ledger, backend, match, state=None):
    if state is not None:
        name = f"{ledger._run.run_id}-policy-g1"
        slow.behave[name] = lambda body: (200, {"name": name, "state": state, "statusMessage": "no capacity"})
        ledger.intend("trainer", "policy", 1, spec_of(backend, slow))
    with ControlPlane("embedded", slow.base_url, "k", backend.home / "models") as control:
        started = time.monotonic()
        with pytest.raises(ProvisioningError, match=match):
            provision(control, ledger, timeout_s=1)
        assert time.monotonic() - started < 2.5


def spec_of(backend, slow):
    """The fingerprint of what `config_of()` asks for, whatever the backend."""
    from cookbook.provisioning import _fingerprint, _request

    with ControlPlane("embedded", slow.base_url, "k", backend.home / "models") as control:
        return _fingerprint(_request(control, config_of(), MODEL, "policy", False, Deadline(1)), config_of())


@pytest.mark.parametrize(
    "state", ["JOB_STATE_PENDING", "JOB_STATE_CREATING", "JOB_STATE_RUNNING", "JOB_STATE_CANCELLING"]
)
def test_one_deadline_holds_over_everything(slow, ledger, backend, state):
    slow.behave["healthz"] = lambda body: (503, {})
    assert_late(slow, ledger, backend, rf"trainer_timeout_s=1 s: it is {state} \(no capacity\)", state)


@pytest.mark.parametrize("endpoint", ["accounts", "rlorTrainerJobs"])
def test_a_control_plane_that_hangs_is_given_up_at_the_deadline(slow, ledger, backend, endpoint):
    slow.behave[endpoint] = slow.hang
    assert_late(slow, ledger, backend, r"creating trainer .* no answer within 1 s")
