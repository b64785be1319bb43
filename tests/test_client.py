"""ReconnectableClient: the real SDK on the real backend, and on a trainer that hangs, lies and dies."""

import logging
import os
import signal
import time

import pytest
from fireworks.training.sdk import AdamParams, TrainerJobManager

from cookbook.client import ReconnectableClient
from cookbook.data.datums import datum_from_row
from cookbook.errors import RequestRejected, TrainerLost
from tests.faulty_proxy import Endpoint, FaultyProxy, Legal
from tests.hostile import HostileTrainer
from tests.running_backend import MODEL

ADAM = AdamParams(learning_rate=1e-2)
KEY = "hostile-secret-key"
SESSION_REQUESTS = ("create_session", "create_model")


def rows(seed=0, num_rows=3):
    """Rows of 6 tokens whose last 4 are trained, each with weight 1/12."""
    return [
        datum_from_row([(seed + 7 * n + 3 * t) % 250 for t in range(6)], [0, 0, *[1 / (4 * num_rows)] * 4])
        for n in range(num_rows)
    ]


def bad_rows():
    """A token that the model does not know."""
    return [datum_from_row([1, 2, 100_000], [0, 1, 1])]


@pytest.fixture
def client(manager, trainer):
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as client:
        yield client


def losses(client, steps, start=0):
    return [client.train_step(rows(n), "cross_entropy", ADAM).loss_sum for n in range(start, start + steps)]


# -- on the real backend ---------------------------------------------------------------------------------------------


def test_a_step_trains_and_is_counted(client):
    first, *_, last = [client.train_step(rows(), "cross_entropy", ADAM) for _ in range(4)]
    assert last.loss_sum < first.loss_sum
    assert (first.step, last.step, client.step) == (1, 4, 4)
    assert last.metrics["grad_norm"] > 0
    assert last.seconds > 0


def test_forward_and_forward_backward_see_the_same_loss(client):
    forward = client.forward(rows(), "cross_entropy")
    backward = client.forward_backward(rows(), "cross_entropy")
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"]
    assert forward.loss_fn_outputs[0]["logprobs"].to_numpy().shape == (5,)
    assert client.step == 0
    client.optim_step(ADAM)
    assert client.step == 1
    assert client.forward(rows(), "cross_entropy").metrics["loss:sum"] < forward.metrics["loss:sum"]


def test_a_session_is_opened_although_a_proxy_answers_without_a_word(backend, manager, trainer):
    empty = (Legal("400-empty"),)
    table = [Endpoint(name, "POST", f".*/{name}", empty, 1.0, in_a_row=1, key="") for name in SESSION_REQUESTS]
    with FaultyProxy(backend.base_url, table) as proxy:
        url = f"{proxy.url}/training/v1/rlorTrainerJobs/local/{trainer}"
        with ReconnectableClient(manager, trainer, MODEL, 4, seed=1, base_url=url) as client:
            assert losses(client, 1) != []
        assert proxy.counts == {"400-empty": 3}  # session, model, and the session anew


def test_forwards_in_flight_are_answered_in_any_order_of_asking(client):
    alone = [client.forward(rows(seed), "cross_entropy").metrics["loss:sum"] for seed in range(3)]
    first, refused, second, third = [
        client.submit_forward(data, "cross_entropy") for data in (rows(0), bad_rows(), rows(1), rows(2))
    ]
    assert [sent.result(30).metrics["loss:sum"] for sent in (third, first, second)] == [alone[2], *alone[:2]]
    with pytest.raises(RequestRejected, match="100000"):
        refused.result(30)
    late = client.submit_forward(rows(), "cross_entropy")
    client.reconnect()
    with pytest.raises(TrainerLost, match="a session that was given up: reconnected"):
        late.result(30)
    assert not client.is_lost


def cross_entropy_here(data, logprobs):
    pairs = zip(data, logprobs, strict=True)
    loss = -sum((logprob * datum.loss_fn_inputs["weights"].to_torch()).sum() for datum, logprob in pairs)
    return loss, {"mine": float(loss.detach())}


def test_a_custom_loss_steps_like_the_builtin_one(manager, trainer, client):
    output = client.forward_backward_custom(rows(), cross_entropy_here)
    assert output.metrics["mine"] == pytest.approx(output.metrics["loss:sum"])
    client.optim_step(ADAM)
    with ReconnectableClient(manager, trainer, MODEL, 4, seed=1) as builtin:
        builtin.train_step(rows(), "cross_entropy", ADAM)
        expected = builtin.forward(rows(), "cross_entropy").metrics["loss:sum"]
    assert client.forward(rows(), "cross_entropy").metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_what_a_custom_loss_raises_passes_through_and_the_session_stays(client):
    def broken(data, logprobs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        client.forward_backward_custom(rows(), broken)
    assert not client.is_lost
    client.train_step(rows(), "cross_entropy", ADAM)


@pytest.mark.parametrize("call", ["forward", "forward_backward", "train_step"])
def test_a_refused_request_names_the_fault_and_leaves_the_session_usable(client, call):
    before = client.forward(rows(), "cross_entropy").metrics["loss:sum"]
    arguments = [ADAM] if call == "train_step" else []
    with pytest.raises(RequestRejected, match="100000"):
        getattr(client, call)(bad_rows(), "cross_entropy", *arguments)
    with pytest.raises(RequestRejected, match=r"(?s)nonsense"):
        getattr(client, call)(rows(), "nonsense", *arguments)
    assert client.step == 0
    assert client.forward(rows(), "cross_entropy").metrics["loss:sum"] == before


def test_nothing_is_sent_for_an_empty_batch(client):
    with pytest.raises(RequestRejected, match="was not sent: there are no datums"):
        client.forward([], "cross_entropy")
    with pytest.raises(RequestRejected, match="there are no datums"):
        client.train_step([], "cross_entropy", ADAM)
    assert not client.is_lost


def test_a_name_that_exists_cannot_be_saved_again(client):
    assert client.save_state("taken") == "taken"
    with pytest.raises(RequestRejected, match="taken"):
        client.save_state("taken")
    assert "taken" in client.list_checkpoints()


def test_references_that_the_sdk_refuses_are_rejected_without_a_request(client):
    with pytest.raises(RequestRejected, match="was not sent"):
        client.load_state("gs://bucket/x")
    with pytest.raises(RequestRejected, match="DNS label"):
        client.resolve_checkpoint_path("Step_1")
    with pytest.raises(RequestRejected, match="checkpoint_type must be one of base, delta, merged_base, got 'full'"):
        client.save_weights_for_sampler_ext("s", "full")
    assert client.resolve_checkpoint_path("a", "job-1") == "cross_job://job-1/a"
    assert not client.is_lost


def test_after_reconnecting_training_is_refused_until_weights_are_loaded(client):
    losses(client, 1)
    client.save_state("before-reconnect")
    client.reconnect()
    assert client.needs_restore
    for call in (
        lambda: client.train_step(rows(), "cross_entropy", ADAM),
        lambda: client.forward(rows(), "cross_entropy"),
        lambda: client.forward_backward(rows(), "cross_entropy"),
        lambda: client.forward_backward_custom(rows(), cross_entropy_here),
        lambda: client.optim_step(ADAM),
        lambda: client.save_state("never"),
        lambda: client.save_weights_for_sampler_ext("never"),
    ):
        with pytest.raises(TrainerLost, match="resolve_resume"):
            call()
    client.load_state_with_optimizer("before-reconnect", step=1)
    assert (client.step, client.needs_restore) == (1, False)
    losses(client, 1, start=1)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_saved_and_restored_it_goes_on_to_the_same_losses_bit_for_bit(manager, start_trainer, lora_rank):
    job = start_trainer(f"bits-{lora_rank}", lora_rank)
    with ReconnectableClient(manager, job, MODEL, lora_rank, seed=1) as client:
        losses(client, 2)
        client.save_state("at-2")
        undisturbed = losses(client, 3, start=2)
        client.reconnect()
        client.load_state_with_optimizer("at-2", step=2)
        assert losses(client, 3, start=2) == undisturbed
    manager.delete(job)


def test_an_untouched_session_needs_no_restore(client):
    client.forward(rows(), "cross_entropy")
    client.reconnect()
    assert not client.needs_restore
    losses(client, 1)


def test_starting_fresh_needs_a_fresh_model(client):
    first = losses(client, 2)
    with pytest.raises(TrainerLost, match="cannot start at step 0"):
        client.start_fresh()
    client.reconnect()
    client.start_fresh()
    assert losses(client, 2) == first
    assert client.step == 2


def test_weights_only_start_with_a_fresh_optimizer(client):
    losses(client, 2)
    client.save_state("weights-only")
    client.load_state("weights-only")
    assert client.step == 0


def test_an_unloaded_model_needs_a_reconnect(client):
    client.unload()
    with pytest.raises(TrainerLost, match="unloaded"):
        client.forward(rows(), "cross_entropy")
    client.reconnect()
    client.forward(rows(), "cross_entropy")


def test_a_closed_client_refuses_and_frees_its_model(manager, trainer):
    client = ReconnectableClient(manager, trainer, MODEL, 4)
    started = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - started < 4
    with pytest.raises(TrainerLost, match="it was closed"):
        client.forward(rows(), "cross_entropy")


def test_a_killed_trainer_is_lost_at_once_and_the_client_comes_back(manager, start_trainer):
    job = start_trainer("killed")
    with ReconnectableClient(manager, job, MODEL, 4, seed=1) as client:
        undisturbed = losses(client, 2)
        os.kill(manager.get(job)["metadata"]["workerPid"], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(TrainerLost, match=r"answered 410"):
            losses(client, 1)
        assert time.monotonic() - started < 5
        with pytest.raises(TrainerLost, match="was not sent"):
            client.list_checkpoints()
        manager.resume_and_wait(job, poll_interval_s=0.1)
        client.reconnect()
        with pytest.raises(TrainerLost, match="resolve_resume"):
            losses(client, 1)
        client.start_fresh()
        assert losses(client, 2) == undisturbed
    manager.delete(job)


def test_a_session_of_an_older_epoch_is_shut_out(manager, trainer):
    old = {"cookbook_run": "sft-fence", "cookbook_epoch": "1"}
    new = {"cookbook_run": "sft-fence", "cookbook_epoch": "2"}
    with (
        ReconnectableClient(manager, trainer, MODEL, 4, user_metadata=old) as first,
        ReconnectableClient(manager, trainer, MODEL, 4, user_metadata=new) as second,
    ):
        with pytest.raises(TrainerLost, match="410"):
            first.forward(rows(), "cross_entropy")
        with pytest.raises(TrainerLost, match="epoch 2"):
            first.reconnect()
        second.forward(rows(), "cross_entropy")


# -- on a hostile one --------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile():
    trainer = HostileTrainer()
    yield trainer
    trainer.close()


@pytest.fixture
def connect(hostile):
    """Makes clients of the hostile trainer with a short deadline."""
    made = []

    def make(timeout_s=1.0):
        manager = TrainerJobManager(api_key=KEY, base_url=hostile.base_url)
        made.append(manager)
        client = ReconnectableClient(manager, "job", MODEL, default_timeout_s=timeout_s, state_timeout_s=timeout_s)
        made.append(client)
        return client

    yield make
    for each in made:
        each.close()


def assert_lost_in_time(call, match, timeout_s=1.0):
    started = time.monotonic()
    with pytest.raises(TrainerLost, match=match):
        call()
    assert time.monotonic() - started < timeout_s + 1


@pytest.mark.parametrize("endpoint", ["accounts", "create_session", "create_model", "retrieve_future"])
def test_connecting_to_a_trainer_that_hangs_ends_at_the_deadline(hostile, connect, endpoint):
    hostile.behave[endpoint] = hostile.hang
    assert_lost_in_time(connect, r"connecting was not answered within 1 s")


@pytest.mark.parametrize("endpoint", ["optim_step", "retrieve_future"])
def test_a_call_that_hangs_ends_at_the_deadline_and_the_session_is_not_used_again(hostile, connect, endpoint):
    client = connect()
    hostile.behave[endpoint] = hostile.hang
    assert_lost_in_time(lambda: client.optim_step(ADAM), r"optim_step was not answered within 1 s.*reconnect\(\)")
    sent = hostile.names()
    with pytest.raises(TrainerLost, match="was not sent"):
        client.forward(rows(), "cross_entropy")
    assert [name for name in hostile.names()[len(sent) :] if name == "forward"] == []
    assert client.step == 0


def test_a_call_has_its_own_deadline(hostile, connect):
    client = connect(timeout_s=30)
    hostile.behave["retrieve_future"] = hostile.hang
    assert_lost_in_time(lambda: client.save_state("a", timeout_s=0.3), r"within 0\.3 s", timeout_s=0.3)


def test_a_session_that_comes_too_late_is_closed(hostile, connect):
    def late(body):
        hostile.released.wait()
        return 200, {"type": "create_session", "session_id": "late"}

    hostile.behave["create_session"] = late
    assert_lost_in_time(lambda: connect(0.3), "connecting", timeout_s=0.3)
    hostile.released.set()
    time.sleep(0.5)
    assert "create_model" not in hostile.names()


@pytest.mark.parametrize(
    ("endpoint", "status", "match"),
    [
        ("forward", 404, r"POST /training/v1/.*/forward answered 404, request req-7: .*nothing here"),
        ("forward", 410, r"forward answered 410"),
        ("forward", 425, r"forward answered 425"),
        ("forward", 400, r"forward answered 400"),
        ("retrieve_future", 410, r"retrieve_future answered 410, request req-7: .*nothing here"),
        ("retrieve_future", 404, r"retrieve_future answered 404"),
    ],
)
def test_an_answer_that_ends_the_session_is_described(hostile, connect, endpoint, status, match):
    client = connect(timeout_s=10)
    hostile.behave[endpoint] = lambda body: (status, {"detail": "nothing here"})
    with pytest.raises(TrainerLost, match=match):
        client.forward(rows(), "cross_entropy")
    assert client.is_lost


@pytest.mark.parametrize("category", ["server", "unknown"])
def test_a_failure_of_the_trainer_itself_loses_the_session(hostile, connect, category):
    client = connect()
    hostile.results["forward_backward-1"] = {"error": "out of memory", "category": category}
    with pytest.raises(TrainerLost, match=rf"the trainer failed \({category} error.*\): out of memory"):
        client.forward_backward(rows(), "cross_entropy")
    assert client.is_lost


def test_the_optimizer_step_is_submitted_before_the_gradient_is_waited_for(hostile, connect):
    client = connect(timeout_s=5)
    default = hostile._default

    def answer_when_stepped(body):
        if body["request_id"].startswith("forward_backward"):
            while "optim_step" not in hostile.names():
                time.sleep(0.01)
        return default("retrieve_future", body)

    hostile.behave["retrieve_future"] = answer_when_stepped
    assert client.train_step(rows(), "cross_entropy", ADAM).loss_sum == 1.0


def test_a_submitted_forward_that_is_not_answered_loses_the_session_and_the_others_with_it(hostile, connect):
    hostile.behave["retrieve_future"] = lambda body: (
        hostile.hang(body) if "forward" in body["request_id"] else (200, hostile.results[body["request_id"]])
    )
    client = connect()
    first, second = [client.submit_forward(rows(n), "cross_entropy") for n in range(2)]
    with pytest.raises(TrainerLost, match=r"forward was not answered within 0.3 s"):
        first.result(0.3)
    with pytest.raises(TrainerLost, match="was given up: forward was not answered"):
        second.result(30)
    assert hostile.names().count("forward") == 2  # the second did not wait for the first


def test_a_refused_gradient_whose_step_was_taken_loses_the_session(hostile, connect):
    client = connect()
    hostile.results["forward_backward-1"] = {"error": "row 2 is too long", "category": "user"}
    with pytest.raises(RequestRejected, match="row 2 is too long"):
        client.train_step(rows(), "cross_entropy", ADAM)
    assert client.is_lost
    assert client.step == 0
    client.reconnect()
    assert client.needs_restore


def test_a_refused_call_of_several_requests_loses_the_session(hostile, connect):
    client = connect(timeout_s=10)
    hostile.results["forward_backward-2"] = {"error": "too long", "category": "user"}
    with pytest.raises(RequestRejected, match="too long"):
        client.forward_backward(rows() * 400, "cross_entropy")
    assert hostile.names().count("forward_backward") == 2
    assert client.is_lost


def test_a_lost_answer_is_asked_for_again_under_the_same_sequence_id(hostile, connect):
    client = connect(timeout_s=30)
    default = hostile._default

    def lost_once(body):
        sent = hostile.names().count("optim_step")
        return (0, {}) if sent == 1 else default("optim_step", body)

    hostile.behave["optim_step"] = lost_once
    client.optim_step(ADAM)
    assert client.step == 1
    assert [body["seq_id"] for name, body in hostile.requests if name == "optim_step"] == [1, 1]


def test_ctrl_c_works_while_waiting(hostile, connect):
    client = connect(timeout_s=30)
    hostile.behave["retrieve_future"] = hostile.hang

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            client.forward_backward(rows(), "cross_entropy")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 2
    assert client.is_lost


def test_closing_does_not_wait_for_a_trainer_that_hangs(hostile, connect):
    client = connect()
    for endpoint in ("unload_model", "retrieve_future", "telemetry", "session_heartbeat"):
        hostile.behave[endpoint] = hostile.hang
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 4


def test_the_key_is_nowhere_to_be_seen(hostile, connect, caplog):
    caplog.set_level(logging.DEBUG)
    client = connect()
    hostile.behave["forward"] = lambda body: (401, {"detail": f"{KEY} is not a key"})
    with pytest.raises(TrainerLost) as lost:
        client.forward(rows(), "cross_entropy")
    assert "[key] is not a key" in str(lost.value)
    assert (lost.value.__cause__, lost.value.__context__) == (None, None)
    assert KEY not in repr(lost.value) + repr(client) + caplog.text
