"""WeightSync: trained weights reach a real deployment and nothing else does; deadlines and faults of every state."""

import logging
import signal
import time
from contextlib import contextmanager

import httpx
import pytest
from fireworks.training.sdk import AdamParams, DeploymentConfig

from cookbook.client import ReconnectableClient
from cookbook.config import StorageConfig, WeightSyncConfig
from cookbook.control_plane import ControlPlane
from cookbook.data.datums import datum_from_row
from cookbook.deployments import DeploymentHandle
from cookbook.errors import TrainerLost, WeightSyncError
from cookbook.provisioning import TrainerHandle
from cookbook.run import RunDirectory
from cookbook.upkeep import Upkeep
from cookbook.weight_sync import SyncState, WeightSync
from tests.hostile import HostileTrainer
from tests.running_backend import MODEL

KEY = "hostile-secret-key"
PROMPT = [5, 6, 7, 8]


def rows():
    return [datum_from_row([*PROMPT, 9, 10, 11], [0, 0, 0, 0, 1, 1, 1])]


def train(client):
    client.train_step(rows(), "cross_entropy", AdamParams(learning_rate=3e-2))


def handles(control, job_id, deployment_id):
    trainer = TrainerHandle(job_id, f"accounts/local/rlorTrainerJobs/{job_id}", "http://unused", MODEL, None, 1)
    name = f"accounts/local/deployments/{deployment_id}"
    return DeploymentHandle(deployment_id, name, name, MODEL, adopted=False, generation=1), trainer


# -- on the real backend -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture(scope="module")
def deployment(control):
    """A deployment that hot loads from no trainer yet."""
    args = ["--compute-dtype=float32", "--threads=1"]
    control.deployments.create_or_get(
        DeploymentConfig("synced", MODEL, accelerator_type="CPU", min_replica_count=1, extra_args=args)
    )
    yield "synced"
    control.delete_deployment("synced")


def greedy(control, deployment_id):
    """What the deployment answers, and the snapshot that it says has answered."""
    model = f"accounts/local/deployments/{deployment_id}"
    body = {"model": model, "prompt": PROMPT, "max_tokens": 3, "temperature": 0.0, "raw_output": True, "logprobs": True}
    key = {"X-Api-Key": control.jobs.api_key}
    answer = httpx.post(
        f"{control.base_url}/inference/v1/completions", json=body, headers=key, timeout=60, trust_env=False
    ).raise_for_status()
    choice = answer.json()["choices"][0]
    tokens = choice["raw_output"]["completion_token_ids"]
    return tokens, [entry["logprob"] for entry in choice["logprobs"]["content"]], answer.headers["x-snapshot-identity"]


@contextmanager
def syncing(control, job, deployment, config):
    """A full-parameter client and its syncs."""
    with (
        ReconnectableClient(control.jobs, job, MODEL, 0) as client,
        WeightSync(control, *handles(control, job, deployment), client, config) as syncs,
    ):
        yield client, syncs


def trainer_logprobs(client, tokens):
    datum = datum_from_row([*PROMPT, *tokens], [1.0] * (len(PROMPT) + len(tokens)))
    (output,) = client.forward([datum], "cross_entropy").loss_fn_outputs
    return output["logprobs"].to_numpy()[len(PROMPT) - 1 :]


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_deployment_serves_what_was_trained(control, deployment, start_trainer, lora_rank):
    job = start_trainer(f"synced-{lora_rank}", lora_rank)
    before = greedy(control, deployment)
    with ReconnectableClient(control.jobs, job, MODEL, lora_rank, seed=1) as client:
        syncs = WeightSync(control, *handles(control, job, deployment), client, WeightSyncConfig())
        assert (syncs.state, syncs.version) == (SyncState.NEW, "")
        for _ in range(3):
            train(client)
        first = syncs.sync("step-3", first=True)
        assert (syncs.state, syncs.version) == (SyncState.SERVING, first.version)
        assert first.version.startswith("step-3-1-")
        assert min(first.save_s, first.load_s, first.verify_s) > 0
        tokens, logprobs, version = greedy(control, deployment)
        assert version == syncs.serving() == first.version
        assert logprobs != before[1]
        assert logprobs == pytest.approx(trainer_logprobs(client, tokens), abs=2e-3 if lora_rank else 2e-2)
        assert control.deployment(deployment)["hotLoadTrainerJob"].endswith(job)

        train(client)
        second = syncs.sync("step-4", first=False)
        assert second.seconds < 5
        assert greedy(control, deployment)[2] == second.version
        syncs.close()
    control.jobs.delete(job)


def test_a_name_is_never_used_twice_and_a_new_session_starts_whole(control, deployment, start_trainer):
    job = start_trainer("synced-again", 0)
    with syncing(control, job, deployment, WeightSyncConfig()) as (client, syncs):
        versions = [syncs.sync("step-0", first=n == 0).version for n in range(2)]
        client.reconnect()
        versions.append(syncs.sync("step-0", first=False).version)
        assert len(set(versions)) == 3
        assert [version.rsplit("-", 1)[0] for version in versions] == ["step-0-1", "step-0-2", "step-0-3"]
        kinds = {row["name"].rsplit("/")[-1]: row["checkpointType"] for row in control.jobs.list_checkpoints(job)}
        assert [kinds[version].removeprefix("CHECKPOINT_TYPE_") for version in versions] == [
            "INFERENCE_BASE",
            "INFERENCE_ARC_V2",
            "INFERENCE_BASE",
        ]
        # A snapshot that the deployment cannot find: it keeps what it has, and the next sync is whole again.
        control.deployments.update(
            deployment, {"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/nobody"}, "hot_load_trainer_job"
        )
        with pytest.raises(
            WeightSyncError, match=r"(?s)'step-1-1-\w+' to deployment synced failed while loading.*nobody"
        ):
            syncs.sync("step-1", first=False)
        assert syncs.state == SyncState.FAILED
        assert syncs.serving() == versions[-1]
        control.deployments.update(
            deployment, {"hotLoadTrainerJob": f"accounts/local/rlorTrainerJobs/{job}"}, "hot_load_trainer_job"
        )
        retried = syncs.sync("step-1", first=False).version
        assert greedy(control, deployment)[2] == retried
        kinds = {row["name"].rsplit("/")[-1]: row["checkpointType"] for row in control.jobs.list_checkpoints(job)}
        assert kinds[retried].endswith("INFERENCE_BASE")
    control.jobs.delete(job)


def test_snapshots_that_nothing_will_load_any_more_go(control, deployment, start_trainer, backend, tmp_path):
    job = start_trainer("synced-often", 4)
    config = {"backend": "embedded"}
    with (
        RunDirectory.open(tmp_path / "run", recipe="rl", config=config, home=backend.home) as directory,
        ReconnectableClient(control.jobs, job, MODEL, 4) as client,
        WeightSync(control, *handles(control, job, deployment), client, WeightSyncConfig()) as syncs,
    ):
        upkeep = Upkeep(directory, StorageConfig(), backend.home)
        versions = []
        for step in range(5):
            versions.append(syncs.sync(f"step-{step}", first=step == 0).version)
            assert syncs.owns(versions[-1])
            upkeep.after_sync(control, syncs)
        upkeep.finish(20)
        assert greedy(control, deployment)[2] == versions[-1]
        kept = [row["name"].rpartition("/")[2] for row in control.list_checkpoints(job)]
        assert kept == versions[-2:]
        assert (syncs.needless(), syncs.owns(versions[0]), syncs.owns("step-4-1-00000000")) == ([], True, True)
        assert not syncs.owns("step-9-1-00000000")
    control.jobs.delete(job)


def test_the_first_checkpoint_type_is_the_configs(control, deployment, start_trainer):
    job = start_trainer("synced-delta", 0)
    config = WeightSyncConfig(first_checkpoint_type="delta")
    with syncing(control, job, deployment, config) as (client, syncs):
        with pytest.raises(WeightSyncError, match=r"failed while saving after .*: .*checkpoint_type delta"):
            syncs.sync("step-0", first=True)
        assert not client.is_lost
        assert syncs.sync("step-0", first=False).version.startswith("step-0-2-")  # whole, after the failure
    control.jobs.delete(job)


# -- on a hostile one --------------------------------------------------------------------------------------------------


class HostileDeployment(HostileTrainer):
    """Beside the trainer, a deployment that says of itself what `status` is. It loads at once, unless told not to."""

    def __init__(self):
        super().__init__()
        self.identity = None
        self.loads = []
        self.behave["d"] = lambda body: (
            200,
            {"name": "d", "state": "READY", "hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/t"},
        )
        self.behave["hot_load"] = self.hot_load
        self.behave["completions"] = lambda body: (200, {})

    def hot_load(self, body):
        if body:
            self.loads.append(body)
            self.identity = body["identity"]
        return 200, self.status(self.identity)

    @staticmethod
    def status(*identities, stage="done", target=None):
        state = {"stage": stage, "target_snapshot_identity": target}
        return {
            "replicas": [
                {"current_snapshot_identity": identity, "readiness": True, "loading_state": state}
                for identity in identities
            ]
        }


@pytest.fixture
def hostile():
    hostile = HostileDeployment()
    yield hostile
    hostile.close()


@pytest.fixture
def syncs(hostile, tmp_path):
    with ControlPlane("embedded", hostile.base_url, KEY, tmp_path) as control:
        client = ReconnectableClient(control.jobs, "t", MODEL, default_timeout_s=2, state_timeout_s=2)
        with client, WeightSync(control, *handles(control, "t", "d"), client, quick()) as syncs:
            yield syncs


def quick():
    return WeightSyncConfig(dcp_timeout=1, weight_sync_timeout=1)


def assert_fails(syncs, match, seconds=2.5):
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=match) as failed:
        syncs.sync("step-1", first=True)
    assert time.monotonic() - started < seconds
    assert syncs.state == SyncState.FAILED
    assert (failed.value.__cause__, failed.value.__context__) == (None, None)
    return str(failed.value)


def test_deltas_build_on_what_was_proved_to_be_served(hostile, syncs):
    first = syncs.sync("step-1", first=True).version
    second = syncs.sync("step-2", first=False).version
    kinds = [body["checkpoint_type"] for name, body in hostile.requests if name == "save_weights_for_sampler"]
    assert kinds == ["base", "delta"]
    assert [load["identity"] for load in hostile.loads] == [first, second]
    assert "incremental_snapshot_metadata" not in hostile.loads[0]
    assert hostile.loads[1]["incremental_snapshot_metadata"]["previous_snapshot_identity"] == first
    assert hostile.names().count("completions") == 1  # the warm-up of the first


def test_a_save_that_hangs_loses_the_session_at_its_deadline_and_loads_nothing(hostile, syncs):
    hostile.behave["save_weights_for_sampler"] = hostile.hang
    started = time.monotonic()
    with pytest.raises(TrainerLost, match="within 1 s"):
        syncs.sync("step-1", first=True)
    assert time.monotonic() - started < 2
    assert (syncs.state, hostile.loads) == (SyncState.FAILED, [])


def test_a_load_that_hangs_is_given_up_and_cannot_happen_later(hostile, syncs):
    def hang_on_load(body):
        return hostile.hang(body) if body else hostile.hot_load(body)

    hostile.behave["hot_load"] = hang_on_load
    hostile.identity = "old"
    assert_fails(syncs, r"snapshot 'step-1-1-\w+' to deployment d failed while loading after 1\.\d s: not done within")
    hostile.behave["hot_load"] = hostile.hot_load
    hostile.released.set()  # 503 for the request that hung, which the SDK would send again
    second = syncs.sync("step-1", first=False).version
    time.sleep(2.5)
    assert [load["identity"] for load in hostile.loads] == [second]
    kinds = [body["checkpoint_type"] for name, body in hostile.requests if name == "save_weights_for_sampler"]
    assert kinds == ["base", "base"]


def test_a_deployment_that_reports_an_error_is_quoted(hostile, syncs):
    def broken(body):
        target = body["identity"] if body else hostile.target
        hostile.target = target
        return 200, hostile.status("old", stage="error", target=target)

    hostile.target = None
    hostile.behave["hot_load"] = broken
    text = assert_fails(syncs, r"failed while loading after .* s: Hotload failed for snapshot 'step-1-1-\w+'\. The")
    assert "The deployment says: [{'stage': 'error'" in text
    assert "https://" not in text


def test_every_replica_must_serve_the_snapshot(hostile, syncs):
    hostile.behave["hot_load"] = lambda body: (200, hostile.hot_load(body) and hostile.status(hostile.identity, "old"))
    assert_fails(syncs, r"failed while verifying after .*: its 2 replicas serve old, step-1-1-\w+")
    with pytest.raises(WeightSyncError, match="2 replicas of deployment d serve different snapshots: 'old', 'step"):
        syncs.serving()


def test_a_refusal_is_told_in_the_backends_words_and_without_the_key(hostile, syncs, caplog):
    caplog.set_level(logging.DEBUG)

    def refuse(body):
        return (400, {"error": {"message": f"{KEY} may not load"}}) if body else hostile.hot_load(body)

    hostile.identity = "old"
    hostile.behave["hot_load"] = refuse
    text = assert_fails(syncs, r"HTTP 400, request req-7: \[key\] may not load")
    assert KEY not in text
    hostile.behave["hot_load"] = lambda body: (404, {"error": {"message": f"no deployment for {KEY}"}})
    with pytest.raises(WeightSyncError, match=r"cannot be asked what it serves: .*HTTP 404.*\[key\]"):
        syncs.serving()


def test_ctrl_c_gives_the_load_up(hostile, syncs):
    hostile.behave["hot_load"] = lambda body: hostile.hang(body) if body else hostile.hot_load(body)
    hostile.identity = "old"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            syncs.sync("step-1", first=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert syncs.state == SyncState.FAILED
