"""The trainer of a run on the real backend: made, found again, resumed, replaced, released; and models out of it."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fireworks.training.sdk import AdamParams

from cookbook.checkpoints import save_checkpoint
from cookbook.client import ReconnectableClient
from cookbook.config import Environment, RLConfig, SFTConfig
from cookbook.data.datums import datum_from_row
from cookbook.deadlines import Deadline
from cookbook.errors import ConfigError, LeaseLost, ModelError, ProvisioningError
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import (
    ControlPlane,
    _fingerprint,
    _request,
    connect,
    promote,
    provision_trainer,
    release_trainers,
    wire_model,
)
from cookbook.run import RunDirectory
from tests.hostile import HostileTrainer
from tests.running_backend import MODEL

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


def spec_of(control, config):
    """The fingerprint of what a config asks for, as the ledger has it."""
    request = _request(control, config, MODEL, "policy", False, Deadline(5))
    return _fingerprint(request, config)


def worker_pid(control, trainer):
    return control.job(trainer.job_id)["metadata"]["workerPid"]


def test_a_trainer_is_found_again_and_resumed_whatever_happened_to_it(control, ledger, run, backend):
    """In one test, as each start of a trainer takes seconds."""
    config = config_of({"training_shape_id": SHAPE})
    name = f"{run.run_id}-policy-g1"
    ledger.intend("trainer", "policy", 1, spec_of(control, config))  # and died before it could create it
    trainer = provision(control, ledger, config)
    assert (trainer.job_id, trainer.generation) == (name, 1)
    assert trainer.job_name == f"accounts/local/rlorTrainerJobs/{name}"
    assert (trainer.base_model, trainer.base_url) == (MODEL, control.trainer_url(name))
    assert trainer.max_context_length == 512  # the model's; the shape's is longer
    assert control.job(name)["trainingShape"].startswith(SHAPE)
    assert [record.state for record in ledger.all()] == ["confirmed"]
    assert name in {job["name"].rsplit("/")[-1] for job in control.list_jobs()}

    pid = worker_pid(control, trainer)
    ledger.intend("trainer", "policy", 1, spec_of(control, config))  # and died before it could confirm it
    later = config.model_copy(update={"infra": config.infra.model_copy(update={"trainer_timeout_s": 99.0})})
    assert provision(control, ledger, later) == trainer
    assert worker_pid(control, trainer) == pid
    assert [record.state for record in ledger.all()] == ["confirmed"]

    os.kill(pid, signal.SIGKILL)
    assert provision(control, ledger, config) == trainer
    assert worker_pid(control, trainer) != pid

    release_trainers(control, ledger, delete=False)
    assert control.job(name)["state"] == "JOB_STATE_CANCELLED"
    assert provision(control, ledger, config) == trainer
    assert control.job(name)["state"] == "JOB_STATE_RUNNING"
    assert [record.state for record in ledger.all()] == ["confirmed"]


def test_what_is_deleted_or_no_longer_asked_for_is_followed_by_the_next_generation(control, ledger, run):
    first = provision(control, ledger)
    second = provision(control, ledger, config_of({"extra_args": ["--threads=1"]}))
    assert second.generation == 2
    assert control.job(first.job_id)["state"] == "JOB_STATE_DELETED"
    control.delete(second.job_id)  # by somebody else, so not in the ledger
    third = provision(control, ledger, config_of({"extra_args": ["--threads=1"]}))
    assert third.job_id == f"{run.run_id}-policy-g3"

    (run.path / ".lock").unlink()
    with RunDirectory.open(run.path, recipe="sft", config={}, home=run.path.parent / "home") as successor:
        with pytest.raises(LeaseLost):  # a superseded owner does not touch what the new one uses
            release_trainers(control, ledger, delete=True)
        assert control.job(third.job_id)["state"] == "JOB_STATE_RUNNING"
        release_trainers(control, ResourceLedger(successor), delete=True)
    assert control.job(third.job_id)["state"] == "JOB_STATE_DELETED"
    assert [record.state for record in ledger.all()] == ["freed"] * 3


def test_one_trainer_that_cannot_be_freed_does_not_keep_the_others(control, ledger, monkeypatch):
    trainers = [
        provision_trainer(control, ledger, config_of(), role=role, deadline=Deadline(60)).job_id
        for role in ("policy", "reference")
    ]
    cancel = control.cancel

    def refuse_the_first(job_id, timeout_s):
        if job_id == trainers[0]:
            raise ProvisioningError("it does not answer.")
        cancel(job_id, timeout_s)

    monkeypatch.setattr(control, "cancel", refuse_the_first)
    with pytest.raises(ProvisioningError, match="does not answer"):
        release_trainers(control, ledger, delete=False)
    assert [control.job(job_id)["state"] for job_id in trainers] == ["JOB_STATE_RUNNING", "JOB_STATE_CANCELLED"]
    monkeypatch.undo()
    release_trainers(control, ledger, delete=True)


def test_a_context_longer_than_the_shapes_is_a_config_error(control, ledger):
    assert control.shape(SHAPE).max_supported_context_length == 4096
    with pytest.raises(ConfigError, match=r"max_seq_len: is 5000, but training shape .* at most 4096 tokens"):
        provision(control, ledger, config_of({"training_shape_id": SHAPE}, max_seq_len=5000))
    assert ledger.all() == []


def test_a_shape_that_does_not_exist_or_suit_is_refused_in_the_backends_words(control, ledger):
    with pytest.raises(ProvisioningError, match=r"training_shape_id 'accounts/local/trainingShapes/none' failed"):
        provision(control, ledger, config_of({"training_shape_id": "accounts/local/trainingShapes/none"}))
    with pytest.raises(ProvisioningError, match="POLICY_TRAINER"):
        provision(control, ledger, config_of({"training_shape_id": "accounts/local/trainingShapes/cpu-full"}))


def test_a_failed_trainer_says_why(control, ledger):
    with pytest.raises(ProvisioningError, match=r"JOB_STATE_FAILED: .*--nonsense"):
        provision(control, ledger, config_of({"extra_args": ["--nonsense"]}))


def test_a_model_that_is_not_there_provisions_nothing(control, ledger):
    config = config_of().model_copy(update={"base_model": "no-such-model"})
    with pytest.raises(ModelError, match="no-such-model"):
        provision(control, ledger, config)
    assert ledger.all() == []


# -- trainers of others ------------------------------------------------------------------------------------------------


def adopting(job_id, **fields):
    values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "reward": "exact", "lora_rank": 4}
    return RLConfig(**{**values, **fields}, policy_job_id=job_id, infra={"extra_args": QUICK})


def test_an_adopted_trainer_is_used_and_never_stopped_or_deleted(control, ledger, start_trainer):
    job = start_trainer("adopted")
    trainer = provision(control, ledger, adopting(job))
    assert (trainer.job_id, trainer.adopted, trainer.generation, trainer.lora_rank) == (job, True, 0, 4)
    assert (trainer.base_url, trainer.max_context_length) == (control.trainer_url(job), 512)
    for delete in (False, True):
        release_trainers(control, ledger, delete=delete)
    assert control.job(job)["state"] == "JOB_STATE_RUNNING"

    with pytest.raises(ConfigError, match=r"policy_job_id: trainer 'adopted' has LoRA rank 4, lora_rank is 8"):
        provision(control, ledger, adopting(job, lora_rank=8))
    other = adopting(job).model_copy(update={"base_model": str(control.models_dir / "tiny" / ".")})
    assert provision(control, ledger, other) == trainer  # the same model by another name

    where = f"{control.base_url}/training/v1/rlorTrainerJobs/local/{job}"
    named = provision(control, ledger, adopting(job, policy_base_url=where))
    assert named.base_url == where
    with ReconnectableClient(control.jobs, "nobody", named.base_model, 4, base_url=where) as client:
        assert client.list_checkpoints() == []

    control.cancel(job)  # by somebody else
    assert provision(control, ledger, adopting(job)) == trainer
    assert control.job(job)["state"] == "JOB_STATE_RUNNING"
    control.delete(job)
    with pytest.raises(ProvisioningError, match=r"policy_job_id: trainer 'adopted' is JOB_STATE_DELETED"):
        provision(control, ledger, adopting(job))
    with pytest.raises(ProvisioningError, match=r"policy_job_id: trainer 'nobody' does not exist"):
        provision(control, ledger, adopting("nobody"))
    assert ledger.all() == []


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
    release_trainers(control, ledger, delete=True)

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
    with pytest.raises(ConfigError, match=r"FIREWORKS_API_KEY: is not set.*Secret block.*other commands do not"):
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
            lambda: stranger.shape(SHAPE),
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


# -- a backend that does not come to the point -------------------------------------------------------------------------


@pytest.fixture
def slow():
    trainer = HostileTrainer()
    trainer.behave["rlorTrainerJobs"] = lambda body: (200, {"name": "accounts/local/rlorTrainerJobs/x"})
    yield trainer
    trainer.close()


@pytest.fixture
def slow_control(slow, backend):
    with ControlPlane("embedded", slow.base_url, "k", backend.home / "models") as control:
        yield control


def show(slow, run, generation, state, **fields):
    """Let the slow backend have a trainer in a state."""
    name = f"{run.run_id}-policy-g{generation}"
    job = {"name": f"accounts/local/rlorTrainerJobs/{name}", "state": state, "statusMessage": "no capacity", **fields}
    slow.behave[name] = lambda body: (200, job)


def assert_late(control, ledger, match):
    started = time.monotonic()
    with pytest.raises(ProvisioningError, match=match):
        provision(control, ledger, timeout_s=1)
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize(
    "state", ["JOB_STATE_PENDING", "JOB_STATE_CREATING", "JOB_STATE_RUNNING", "JOB_STATE_CANCELLING"]
)
def test_one_deadline_holds_over_everything(slow, slow_control, ledger, run, state):
    slow.behave["healthz"] = lambda body: (503, {})
    show(slow, run, 1, state)
    ledger.intend("trainer", "policy", 1, spec_of(slow_control, config_of()))
    assert_late(slow_control, ledger, rf"infra\.trainer_timeout_s=1 s: it is {state} \(no capacity\)")


@pytest.mark.parametrize("endpoint", ["accounts", "rlorTrainerJobs"])
def test_a_control_plane_that_hangs_is_given_up_at_the_deadline(slow, slow_control, ledger, endpoint):
    slow.behave[endpoint] = slow.hang
    assert_late(slow_control, ledger, r"creating trainer .* no answer within 1 s")


def test_a_trainer_that_cannot_be_resumed_is_replaced(slow, slow_control, ledger, run):
    show(slow, run, 1, "JOB_STATE_CANCELLED")
    show(slow, run, 2, "JOB_STATE_RUNNING")
    slow.behave[f"{run.run_id}-policy-g1:resume"] = lambda body: (400, {"error": {"message": "too old"}})
    ledger.confirm(ledger.intend("trainer", "policy", 1, spec_of(slow_control, config_of())))
    assert provision(slow_control, ledger).generation == 2
    assert [record.state for record in ledger.all()] == ["freed", "confirmed"]
    names = slow.names()
    assert names.index(f"{run.run_id}-policy-g1:resume") < names.index("rlorTrainerJobs")


def test_a_state_from_before_the_resume_is_not_taken_for_a_new_failure(slow, slow_control, ledger, run):
    show(slow, run, 1, "JOB_STATE_FAILED", updateTime="1")
    slow.behave[f"{run.run_id}-policy-g1:resume"] = lambda body: (200, {})
    ledger.confirm(ledger.intend("trainer", "policy", 1, spec_of(slow_control, config_of())))
    threading.Timer(0.5, show, [slow, run, 1, "JOB_STATE_RUNNING"], {"updateTime": "2"}).start()
    assert provision(slow_control, ledger).generation == 1
