"""The deployment of a run on the real backend: made beside its trainer, found again, replaced, adopted, released."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
from fireworks.training.sdk import DeploymentConfig

from cookbook import deployments, sessions
from cookbook.config import DeployConfig, DPOConfig, RLConfig
from cookbook.control_plane import ControlPlane
from cookbook.deadlines import Deadline
from cookbook.deployment_request import ServedModel, deployment_id_of, served_model
from cookbook.deployments import attach_trainer, deploy_model, provision_deployment, release_deployments
from cookbook.errors import ConfigError, LeaseLost, ModelError, ProvisioningError
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import TrainerHandle, provision_trainer
from cookbook.run import RunDirectory
from cookbook.sessions import open_session
from tests.hostile import HostileTrainer
from tests.running_backend import MODEL
from tests.tiny_model import make_tiny_adapter

SHAPE = "accounts/local/deploymentShapes/cpu"
QUICK = ["--compute-dtype=float32", "--threads=1"]
TRAINER = TrainerHandle("t", "accounts/local/rlorTrainerJobs/t", "http://unused", MODEL, None, 1)


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture
def run(tmp_path, control):
    with RunDirectory.open(tmp_path / "run", recipe="rl", config={}, home=tmp_path / "home") as run:
        yield run
        for record in ResourceLedger(run).all():
            (control.delete_deployment if record.kind == "deployment" else control.delete)(record.resource_id)


@pytest.fixture
def ledger(run):
    return ResourceLedger(run)


def config_of(deployment=None, **fields):
    deployment = {"deployment_extra_args": QUICK, **(deployment or {})}
    values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "reward": "exact", "lora_rank": 4}
    return RLConfig(**values, infra={"extra_args": QUICK}, deployment=deployment, **fields)


def provision(control, ledger, run, config=None, trainer=TRAINER, timeout_s=60):
    return provision_deployment(
        control, ledger, config or config_of(), trainer=trainer, run_id=run.run_id, deadline=Deadline(timeout_s)
    )


def test_the_id_is_of_model_run_and_generation():
    assert deployment_id_of("accounts/a/models/Qwen3_0.6B", "rl-1f2e3d4c", 1) == "qwen3-0-6b-rl-1f2e3d4c"
    assert deployment_id_of("/models/x", "rl-1f2e3d4c", 2) == "x-rl-1f2e3d4c-g2"
    assert len(deployment_id_of("a" * 62 + "-b", "rl-1f2e3d4c", 12)) == 63
    assert deployment_id_of("/__/", "rl-1", 1) == "model-rl-1"
    assert deployment_id_of("/models/x", "eval-1", 2, "against") == "x-eval-1-against-g2"


def test_it_is_made_beside_its_trainer_and_found_again_whatever_happened_to_it(control, ledger, run):
    """In one test, as each start takes seconds."""
    config = config_of()
    made = []
    beside = threading.Thread(target=lambda: made.append(provision(control, ledger, run, config, trainer=None)))
    beside.start()
    trainer = provision_trainer(control, ledger, config, deadline=Deadline(60))
    beside.join()
    (deployment,) = made
    name = f"tiny-{run.run_id}"
    assert (deployment.deployment_id, deployment.generation, deployment.adopted) == (name, 1, False)
    assert deployment.name == deployment.model == f"accounts/local/deployments/{name}"
    assert deployment.base_model == MODEL
    assert control.is_serving(deployment.model)
    assert control.deployment(name)["hotLoadTrainerJob"] == trainer.job_name
    assert name in {found["name"].rsplit("/")[-1] for found in control.list_deployments()}

    record = ledger.current("sampler")
    ledger.intend("deployment", "sampler", 1, record.spec, resource_id=name)  # and died before it could confirm it
    pid = control.deployment(name)["metadata"]["workerPid"]
    later = config_of({"deployment_timeout_s": 99.0})
    assert provision(control, ledger, run, later, trainer=trainer) == deployment
    assert control.deployment(name)["metadata"]["workerPid"] == pid
    assert {record.state for record in ledger.all()} == {"confirmed"}

    other = replace(trainer, job_name="accounts/local/rlorTrainerJobs/next")
    assert provision(control, ledger, run, config, trainer=other) == deployment
    assert control.deployment(name)["hotLoadTrainerJob"] == other.job_name

    os.kill(pid, signal.SIGKILL)
    second = provision(control, ledger, run, config)
    assert (second.deployment_id, second.generation) == (f"{name}-g2", 2)
    assert control.deployment(name) is None

    (run.path / ".lock").unlink()
    with RunDirectory.open(run.path, recipe="rl", config={}, home=run.path.parent / "home") as successor:
        with pytest.raises(LeaseLost):  # a superseded owner does not touch what the new one uses
            release_deployments(control, ledger)
        assert control.deployment(second.deployment_id)["state"] == "READY"
        release_deployments(control, ResourceLedger(successor))
    assert control.deployment(second.deployment_id) is None
    assert [record.state for record in ledger.all() if record.kind == "deployment"] == ["freed"] * 2


def test_what_has_failed_or_is_no_longer_asked_for_is_followed_by_the_next_generation(control, ledger, run):
    with pytest.raises(ProvisioningError, match=r"(?s)is FAILED: .*--nonsense"):
        provision(control, ledger, run, config_of({"deployment_extra_args": ["--nonsense"]}))
    first = provision(control, ledger, run)
    assert first.generation == 2
    control.deployments.scale_to_zero(first.deployment_id)
    second = provision(control, ledger, run)
    assert second.generation == 3
    third = provision(control, ledger, run, config_of({"deployment_shape": SHAPE}))
    assert third.generation == 4
    assert [control.deployment(d.deployment_id) for d in (first, second)] == [None, None]
    control.delete_deployment(third.deployment_id)  # by somebody else, so not in the ledger
    assert provision(control, ledger, run, config_of({"deployment_shape": SHAPE})).generation == 5


def test_an_adopted_deployment_is_used_and_never_deleted(control, ledger, run, tmp_path):
    control.deployments.create_or_get(
        DeploymentConfig("by-hand", MODEL, accelerator_type="CPU", min_replica_count=1, extra_args=QUICK)
    )
    deployment = provision(control, ledger, run, config_of({"deployment_id": "by-hand"}))
    assert (deployment.deployment_id, deployment.adopted, deployment.generation) == ("by-hand", True, 0)
    assert control.deployment("by-hand")["hotLoadTrainerJob"] == TRAINER.job_name
    assert ledger.all() == []
    release_deployments(control, ledger)
    assert control.deployment("by-hand")["state"] == "READY"

    shutil.copytree(control.models_dir / "tiny", tmp_path / "other")
    other = config_of({"deployment_id": "by-hand"}).model_copy(update={"base_model": str(tmp_path / "other")})
    with pytest.raises(
        ConfigError, match=r"deployment\.deployment_id: deployment 'by-hand' serves .*models/tiny, base"
    ):
        provision(control, ledger, run, other)
    control.deployments.scale_to_zero("by-hand")
    with pytest.raises(ProvisioningError, match="'by-hand' is scaled to zero"):
        provision(control, ledger, run, config_of({"deployment_id": "by-hand"}))
    assert control.deployment("by-hand")["maxReplicaCount"] == 0
    control.delete_deployment("by-hand")
    with pytest.raises(ConfigError, match="there is no deployment 'by-hand' to adopt"):
        provision(control, ledger, run, config_of({"deployment_id": "by-hand"}))


def test_a_shape_that_does_not_exist_is_refused_in_the_backends_words(control, ledger, run):
    shape = "accounts/local/deploymentShapes/none"
    with pytest.raises(ProvisioningError, match=rf"creating deployment .*HTTP 404.*{shape}"):
        provision(control, ledger, run, config_of({"deployment_shape": shape}))


def test_without_a_trainer_job_there_is_no_deployment(control, ledger, run, monkeypatch):
    monkeypatch.setattr(deployments, "_TRAINER_WAIT_S", 0.3)
    ledger.intend("trainer", "policy", 1)  # asked for, but never created
    with pytest.raises(ProvisioningError, match=r"no trainer job was created .* Provision the trainer"):
        provision(control, ledger, run, trainer=None)
    assert control.deployment(f"tiny-{run.run_id}") is None


def test_dpo_has_a_deployment_of_its_trainer_too(control, ledger, run):
    values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "lora_rank": 4}
    config = DPOConfig(**values, weight_sync={"weight_sync_interval": 1}, deployment={"deployment_extra_args": QUICK})
    ledger.confirm(ledger.intend("trainer", "policy", 1, resource_id="the-trainer"))
    deployment = provision(control, ledger, run, config, trainer=None)
    resource = control.deployment(deployment.deployment_id)
    assert resource["hotLoadTrainerJob"] == "accounts/local/rlorTrainerJobs/the-trainer"


# -- any model, without a trainer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(backend):
    return make_tiny_adapter(backend.home / "models" / "tiny-adapter", base=backend.home / "models" / "tiny")


def deploy(control, ledger, run, model, role="deployment", **fields):
    config = DeployConfig(**{"deployment_extra_args": QUICK, **fields})
    found = served_model(model, control.backend, control.models_dir)
    return deploy_model(control, ledger, found, config, run_id=run.run_id, role=role, deadline=Deadline(60))


def prompt_logprobs(control, deployment):
    body = {"model": deployment.model, "prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "logprobs": True}
    with control.completions_client() as client:
        answer = client.post("completions", json=body).raise_for_status().json()
    return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]


def test_a_model_and_an_adapter_of_it_are_served_side_by_side_and_found_again(control, ledger, run, adapter):
    """In one test, as each start takes seconds."""
    base = deploy(control, ledger, run, "tiny", "model")
    tuned = deploy(control, ledger, run, str(adapter), "against")
    assert base.deployment_id == f"tiny-{run.run_id}-model"
    assert (base.model, base.base_model) == (f"accounts/local/deployments/{base.deployment_id}", MODEL)
    assert tuned.base_model == "accounts/local/models/tiny-adapter"
    assert prompt_logprobs(control, base) != prompt_logprobs(control, tuned)
    resource = control.deployment(base.deployment_id)
    assert (resource["hotLoadTrainerJob"], resource["enableHotLoad"], resource["minReplicaCount"]) == (None, False, 0)

    assert deploy(control, ledger, run, MODEL, "model") == base
    os.kill(control.deployment(base.deployment_id)["metadata"]["workerPid"], signal.SIGKILL)
    again = deploy(control, ledger, run, "tiny", "model")
    assert (again.deployment_id, again.generation) == (f"{base.deployment_id}-g2", 2)
    assert deploy(control, ledger, run, "tiny-adapter", "against") == tuned

    release_deployments(control, ledger)
    assert [control.deployment(d.deployment_id) for d in (again, tuned)] == [None, None]
    assert {record.state for record in ledger.all()} == {"freed"}


def test_an_adapter_is_served_on_a_base_that_it_names_as_the_hub_does(control, ledger, run, adapter, hub):
    """As an exported adapter does whose base is of the hub."""
    exported = shutil.copytree(adapter, run.path / "exported")
    config = json.loads((exported / "adapter_config.json").read_text())
    (exported / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/tiny"}))
    base = hub("1")
    assert served_model(str(exported), control.backend, control.models_dir) == ServedModel(str(exported), base)
    tuned, named = deploy(control, ledger, run, str(exported), "a"), deploy(control, ledger, run, str(adapter), "b")
    assert prompt_logprobs(control, tuned) == prompt_logprobs(control, named)


def test_a_session_stays_with_the_revision_that_a_hub_name_meant_at_first(control, backend, hub):
    config = DeployConfig(deployment_extra_args=QUICK)
    hub("1")
    with open_session("chat", control, backend.home) as session:
        first = session.deploy("someone/tiny", config)
        hub("2")
        assert session.deploy("someone/tiny", config) == first
        assert first.base_model.endswith("/snapshots/1")


@pytest.fixture
def hub(tmp_path, control, monkeypatch):
    """A hub with one model, someone/tiny: a function that publishes a revision and returns its folder."""
    import huggingface_hub

    newest = []

    def publish(revision):
        newest.append(tmp_path / "hub" / "snapshots" / revision)
        return shutil.copytree(control.models_dir / "tiny", newest[-1], dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: newest[-1])
    return publish


def test_a_deployment_of_the_model_is_adopted_and_stays(control, ledger, run):
    control.deployments.create_or_get(
        DeploymentConfig("mine", MODEL, accelerator_type="CPU", min_replica_count=1, extra_args=QUICK)
    )
    try:
        handle = deploy(control, ledger, run, "tiny", deployment_id="mine")
        assert (handle.model, handle.adopted) == ("accounts/local/deployments/mine", True)
        release_deployments(control, ledger)
        assert control.deployment("mine")["state"] == "READY"
    finally:
        control.delete_deployment("mine")


def test_a_model_that_cannot_be_served_is_refused_before_anything_is_made(control, ledger, run, tmp_path):
    with pytest.raises(ModelError, match="no model 'nonsense'"):
        deploy(control, ledger, run, "nonsense")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        deploy(control, ledger, run, str(tmp_path / "empty"))
    with ControlPlane("fireworks", control.base_url, "key", tmp_path) as cloud:
        with pytest.raises(ConfigError, match=r"Set deployment\.deployment_shape"):
            deploy(cloud, ledger, run, "accounts/a/models/m")
        with pytest.raises(ConfigError, match="'tiny' is not a model resource"):
            deploy(cloud, ledger, run, "tiny")
    assert served_model("accounts/a/models/m", "fireworks", tmp_path) == ServedModel("accounts/a/models/m")
    assert ledger.all() == []


# -- a backend that does not come to the point -------------------------------------------------------------------------


@pytest.fixture
def slow():
    backend = HostileTrainer()
    backend.behave["deployments"] = lambda body: (200, {"name": "accounts/local/deployments/x"})
    yield backend
    backend.close()


@pytest.fixture
def slow_control(slow, backend):
    with ControlPlane("embedded", slow.base_url, "secret-key", backend.home / "models") as control:
        yield control


def show(slow, run, state, generation=1, **fields):
    """Let the slow backend have a deployment of the run in a state."""
    show_any(slow, f"tiny-{run.run_id}" + ("" if generation == 1 else f"-g{generation}"), state, **fields)


def show_any(slow, name, state, **fields):
    resource = {"name": f"accounts/local/deployments/{name}", "state": state, **fields}
    slow.behave[name] = lambda body: (200, resource)


def assert_late(control, ledger, run, match):
    started = time.monotonic()
    with pytest.raises(ProvisioningError, match=match):
        provision(control, ledger, run, timeout_s=1)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("state", ["CREATING", "UPDATING", "UNHEARD_OF"])
def test_one_deadline_holds_over_everything(slow, slow_control, ledger, run, state):
    slow.behave["completions"] = lambda body: (503, {})
    show(slow, run, state, statusMessage="no capacity")
    assert_late(slow_control, ledger, run, rf"deployment_timeout_s=1 s: it is {state} \(no capacity\)")
    assert [record.state for record in ledger.all()] == ["confirmed"]  # the next start waits on


@pytest.mark.parametrize("endpoint", ["accounts", "deployments"])
def test_a_control_plane_that_hangs_is_given_up_at_the_deadline(slow, slow_control, ledger, run, endpoint):
    slow.behave[f"tiny-{run.run_id}"] = lambda body: (404, {})
    slow.behave[endpoint] = slow.hang
    assert_late(slow_control, ledger, run, r"creating deployment .* no answer within 1 s")


def test_a_deployment_that_answers_is_ready_whatever_its_state_says(slow, slow_control, ledger, run, monkeypatch):
    show(slow, run, "CREATING", hotLoadTrainerJob=TRAINER.job_name)
    answers = iter([503, 200])
    slow.behave["completions"] = lambda body: (next(answers), {})
    monkeypatch.setattr(deployments, "attach_trainer", lambda *_: None)  # this backend would never say READY
    handle = provision(slow_control, ledger, run, timeout_s=5)
    assert handle.deployment_id == f"tiny-{run.run_id}"


def test_a_refusal_is_told_in_the_backends_words_and_without_the_key(slow, slow_control, ledger, run, caplog):
    caplog.set_level(logging.DEBUG)
    slow.behave[f"tiny-{run.run_id}"] = lambda body: (404, {})
    slow.behave["deployments"] = lambda body: (400, {"error": {"message": "secret-key may not have 9 GPUs"}})
    with pytest.raises(ProvisioningError, match=r"HTTP 400, request req-7: \[key\] may not have 9 GPUs") as refused:
        provision(slow_control, ledger, run)
    assert (refused.value.__cause__, refused.value.__context__) == (None, None)
    assert [record.state for record in ledger.all()] == ["freed"]  # nothing can come any more
    show(slow, run, "READY", generation=2, hotLoadTrainerJob="other")
    with pytest.raises(ProvisioningError, match=r"attaching deployment .* no answer within 1 s"):
        attach_trainer(slow_control, provision_without_trainer(slow_control, ledger, run), "t", Deadline(1))


def never_created(slow, run):
    """A backend that takes the request to create the run's deployment, and answers nothing."""
    slow.behave[f"tiny-{run.run_id}"] = lambda body: (404, {})
    slow.behave["deployments"] = slow.hang


def test_what_was_asked_for_and_has_not_come_is_deleted_when_it_comes(slow, slow_control, ledger, run):
    never_created(slow, run)
    assert_late(slow_control, ledger, run, "creating deployment .* no answer")
    before = time.monotonic()
    threading.Timer(0.5, lambda: show(slow, run, "CREATING")).start()
    assert release_deployments(slow_control, ledger, landing_s=10)
    assert 0.4 < time.monotonic() - before < 5
    assert [record.state for record in ledger.all()] == ["freed"]


def test_what_was_asked_for_and_never_comes_stays_in_the_ledger(slow, slow_control, ledger, run):
    never_created(slow, run)
    assert_late(slow_control, ledger, run, "creating deployment .* no answer")
    assert not release_deployments(slow_control, ledger, landing_s=0.3)
    assert [record.state for record in ledger.all()] == ["intended"]


def test_nothing_is_made_once_the_ledger_is_closed(slow, slow_control, ledger, run, monkeypatch):
    never_created(slow, run)
    ledger.confirm(ledger.intend("trainer", "policy", 1))
    monkeypatch.setattr(deployments, "_job_name", lambda *_: ledger.close() or "job")  # while it waits for the trainer
    with pytest.raises(LeaseLost, match="is ending"):
        provision(slow_control, ledger, run, trainer=None)
    with pytest.raises(LeaseLost, match="is ending"):
        ledger.intend("deployment", "sampler", 2)
    assert ("deployments", {}) not in slow.requests
    assert [name for name, body in slow.requests if name == "deployments" and body] == []


def test_a_session_of_what_may_still_come_stays_until_the_next_one(slow, slow_control, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "LANDING_S", 0.3)
    slow.behave["deployments"] = slow.hang
    with open_session("chat", slow_control, tmp_path) as session:
        slow.behave[f"tiny-{session.run.run_id}-deployment"] = lambda body: (404, {})
        with pytest.raises(ProvisioningError, match="no answer within"):
            session.deploy("tiny", DeployConfig(deployment_timeout_s=1))
    assert session.run.path.is_dir()
    show_any(slow, f"tiny-{session.run.run_id}-deployment", "CREATING")
    with open_session("chat", slow_control, tmp_path):
        assert not session.run.path.exists()
        assert slow.names().count(f"tiny-{session.run.run_id}-deployment") > 2


def test_a_thread_that_still_deploys_makes_nothing_while_its_session_ends(slow, slow_control, tmp_path, monkeypatch):
    refused = []

    def release(*arguments, **options):
        with pytest.raises(LeaseLost, match="is ending"):
            session.deploy("tiny", DeployConfig())
        refused.append(True)
        return release_deployments(*arguments, **options)

    monkeypatch.setattr(sessions, "release_deployments", release)
    with open_session("serve", slow_control, tmp_path) as session:
        pass
    assert refused
    assert not session.run.path.exists()


def provision_without_trainer(control, ledger, run):
    ledger.confirm(ledger.intend("trainer", "policy", 1))
    return provision(control, ledger, run, trainer=None)
