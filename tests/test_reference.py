"""The reference: the base model under an adapter, or a trainer of its own; what the policy learns does not move it."""

import os
import signal

import numpy as np
import pytest
from fireworks.training.sdk import AdamParams

from cookbook.client import ReconnectableClient
from cookbook.config import DPOConfig, RLConfig
from cookbook.control_plane import ControlPlane
from cookbook.data.datums import datum_from_row
from cookbook.deadlines import Deadline
from cookbook.errors import LeaseLost, RequestRejected, TrainerLost
from cookbook.ledger import ResourceLedger
from cookbook.provisioning import provision_reference, provision_trainer, release_reference
from cookbook.reference import open_reference
from cookbook.rollouts.records import Completion, PromptGroup
from cookbook.run import RunDirectory

QUICK = ["--compute-dtype=float32", "--threads=1"]
FULL_SHAPE = "accounts/local/trainingShapes/cpu-full"
FORWARD_SHAPE = "accounts/local/trainingShapes/cpu-forward"


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture
def run(tmp_path, control):
    with RunDirectory.open(tmp_path / "run", recipe="rl", config={}, home=tmp_path / "home") as run:
        yield run
        for record in ResourceLedger(run).all():
            control.delete(record.resource_id)


@pytest.fixture
def ledger(run):
    return ResourceLedger(run)


def config_of(infra=None, **fields):
    values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "reward": "exact", "lora_rank": 4}
    return RLConfig(**{**values, **fields}, infra={"extra_args": QUICK, **(infra or {})})


def dpo_config_of(infra=None, **fields):
    values = {"log_path": "unused", "base_model": "tiny", "dataset": "unused", "lora_rank": 4}
    return DPOConfig(**{**values, **fields}, infra={"extra_args": QUICK, **(infra or {})})


def provisioned(control, ledger, config):
    """The policy's trainer and the reference's."""
    deadline = Deadline(60)
    policy = provision_trainer(control, ledger, config, deadline=deadline)
    return policy, provision_reference(control, ledger, config, deadline=deadline)


def rows():
    return [datum_from_row([1, 2, 3, 4 + n, 5, 6], [0, 0, 1, 1, 1, 1]) for n in range(3)]


def base_logprobs(control, trainer, lora_rank):
    """Those of a model as it is made: a fresh adapter changes nothing."""
    with ReconnectableClient(control.jobs, trainer.job_id, trainer.base_model, lora_rank) as client:
        return [
            output["logprobs"].to_numpy().tolist() for output in client.forward(rows(), "cross_entropy").loss_fn_outputs
        ]


def train(client):
    client.train_step(rows(), "cross_entropy", AdamParams(learning_rate=3e-2))


def as_lists(tensors):
    return [tensor.tolist() for tensor in tensors]


def test_the_base_under_the_adapter_stays_where_it_was(control, ledger, run):
    config = config_of()
    policy, none = provisioned(control, ledger, config)
    assert none is None
    expected = base_logprobs(control, policy, 4)
    metadata = run.user_metadata()
    with ReconnectableClient(control.jobs, policy.job_id, policy.base_model, 4, user_metadata=metadata) as client:
        train(client)
        with open_reference(control.jobs, config, policy, none, user_metadata=metadata) as reference:
            assert reference.job_id == policy.job_id
            train(client)  # beside it: the reference has a session of its own
            found = as_lists(reference.logprobs(rows()))
            np.testing.assert_allclose(found, expected, atol=1e-5)
            trained = client.forward(rows(), "cross_entropy").loss_fn_outputs[0]["logprobs"].to_numpy()
            assert abs(trained - np.array(expected[0])).max() > 0.01

            reference._client._loss("its session was closed by the trainer")
            assert as_lists(reference.logprobs(rows())) == found
            with pytest.raises(RequestRejected, match="100000"):
                reference.logprobs([datum_from_row([1, 100_000], [0, 1])])
            os.kill(control.job(policy.job_id)["metadata"]["workerPid"], signal.SIGKILL)
            with pytest.raises(TrainerLost):
                reference.logprobs(rows())


def test_a_reference_trainer_is_provisioned_on_its_own_shape(control, ledger, run):
    config = config_of({"ref_training_shape_id": FORWARD_SHAPE}, lora_rank=0)
    policy, trainer = provisioned(control, ledger, config)
    assert trainer.job_id == f"{run.run_id}-reference-g1"
    assert control.job(trainer.job_id)["trainingShape"].startswith(FORWARD_SHAPE)
    assert provision_reference(control, ledger, config, deadline=Deadline(60)) == trainer
    with open_reference(control.jobs, config, policy, trainer) as reference:
        assert reference.job_id == trainer.job_id
        np.testing.assert_allclose(as_lists(reference.logprobs(rows())), base_logprobs(control, policy, 0), atol=1e-5)


def test_an_adopted_trainer_of_adapters_serves_the_base_under_them(control, ledger, run, trainer):
    config = config_of(lora_rank=0, reference_job_id=trainer)
    adopted = provision_reference(control, ledger, config, deadline=Deadline(60))
    assert (adopted.job_id, adopted.adopted, adopted.lora_rank) == (trainer, True, 4)
    assert ledger.all() == []
    with open_reference(control.jobs, config, adopted, adopted) as reference:
        np.testing.assert_allclose(as_lists(reference.logprobs(rows())), base_logprobs(control, adopted, 4), atol=1e-5)
        groups = [group(0, [[7, 8], [9, 10, 11]]), group(1, [[12]])]
        found = reference.completion_logprobs(groups)
        assert [len(logprobs) for logprobs in found] == [2, 3, 1]
        (whole,) = reference.logprobs([datum_from_row([1, 2, 9, 10, 11], [0, 0, 1, 1, 1])])
        np.testing.assert_allclose(found[1], whole.tolist()[1:], atol=1e-5)


def group(row, completions):
    def completion(tokens):
        zeros = (0.0,) * len(tokens)
        return Completion(tuple(tokens), (True,) * len(tokens), zeros, zeros, "", "stop", "", 0, 1.0)

    return PromptGroup(row, row, (1, 2), tuple(completion(tokens) for tokens in completions))


def test_without_a_kl_term_nothing_is_opened_or_provisioned(control, ledger):
    without = config_of({"ref_training_shape_id": FORWARD_SHAPE}, kl_beta=0)
    assert provision_reference(control, ledger, without, deadline=Deadline(5)) is None
    assert provision_reference(control, ledger, config_of(lora_rank=0), deadline=Deadline(5)) is None
    assert ledger.all() == []
    assert open_reference(control.jobs, without, None, None) is None


def test_dpo_with_an_adapter_asks_the_base_under_it(control, ledger, run, trainer):
    config = dpo_config_of()
    assert provision_reference(control, ledger, config, deadline=Deadline(5)) is None
    release_reference(control, ledger)  # there is none of its own
    assert ledger.all() == []
    policy = adopted_policy(control, ledger, trainer)
    with open_reference(control.jobs, config, policy, None) as reference:
        assert reference.job_id == trainer
        np.testing.assert_allclose(as_lists(reference.logprobs(rows())), base_logprobs(control, policy, 4), atol=1e-5)


def adopted_policy(control, ledger, trainer):
    config = config_of(lora_rank=0, reference_job_id=trainer)
    return provision_reference(control, ledger, config, deadline=Deadline(60))


def test_the_reference_of_dpo_with_full_parameters_stands_where_the_policy_does(control, ledger, run):
    """And is deleted alone, as often as asked; a later start gets the next one."""
    config = dpo_config_of({"training_shape_id": FULL_SHAPE}, lora_rank=0)
    policy, first = provisioned(control, ledger, config)
    job = control.job(first.job_id)
    assert job["trainingShape"].startswith(FULL_SHAPE)
    assert job["forwardOnly"] is True
    with open_reference(control.jobs, config, policy, first) as reference:
        before = as_lists(reference.logprobs(rows()))
        with pytest.raises(RequestRejected, match="only for forward"):
            train(reference._client)
    np.testing.assert_allclose(before, base_logprobs(control, policy, 0), atol=1e-5)

    release_reference(control, ledger)
    written = (run.path / "resources.jsonl").read_bytes()
    release_reference(control, ledger)
    assert (run.path / "resources.jsonl").read_bytes() == written
    assert control.job(first.job_id)["state"] == "JOB_STATE_DELETED"
    assert control.job(policy.job_id)["state"] == "JOB_STATE_RUNNING"
    assert [(record.role, record.state) for record in ledger.all()] == [("policy", "confirmed"), ("reference", "freed")]

    config = dpo_config_of({"training_shape_id": FULL_SHAPE, "ref_training_shape_id": FORWARD_SHAPE}, lora_rank=0)
    second = provision_reference(control, ledger, config, deadline=Deadline(60))
    assert second.job_id == f"{run.run_id}-reference-g2"
    assert control.job(second.job_id)["trainingShape"].startswith(FORWARD_SHAPE)
    ledger.intend("trainer", "reference", 2, "as a process does that dies before it can confirm it")
    release_reference(control, ledger)
    assert control.job(second.job_id)["state"] == "JOB_STATE_DELETED"
    (run.path / ".lock").unlink()
    with RunDirectory.open(run.path, recipe="rl", config={}, home=run.path.parent / "home"), pytest.raises(LeaseLost):
        release_reference(control, ledger)


def test_the_reference_of_dpo_without_a_shape_has_the_policys_hardware(control, ledger):
    config = dpo_config_of({"accelerator_type": "CPU", "accelerator_count": 1}, lora_rank=0, max_seq_len=64)
    trainer = provision_reference(control, ledger, config, deadline=Deadline(60))
    assert trainer.max_context_length == 64
    assert control.job(trainer.job_id)["forwardOnly"] is True
