"""Reference logprobs ahead of training, on a real trainer: computed once, in order, whatever happens on the way."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from cookbook.client import ReconnectableClient
from cookbook.control_plane import ControlPlane
from cookbook.data.datums import datum_from_row
from cookbook.errors import DataError, RequestRejected, TrainerLost
from cookbook.reference import Reference
from cookbook.reference_cache import ReferenceCache
from cookbook.reference_filler import ReferenceFiller
from tests.pairs import make_pair, make_pairs
from tests.running_backend import MODEL


class CountingReference(Reference):
    """Notes how many requests went out, and how many were under way at once. Outlives the filler that it belongs to."""

    num_requests = 0
    most_in_flight = 0
    is_closed_with_filler = False

    def close(self):
        if self.is_closed_with_filler:
            super().close()

    def stream(self, batches, *, max_in_flight):
        answered = 0

        def counted():
            for batch in batches:
                self.num_requests += 1
                self.most_in_flight = max(self.most_in_flight, self.num_requests - answered)
                yield batch

        for logprobs in super().stream(counted(), max_in_flight=max_in_flight):
            answered += 1
            yield logprobs


@pytest.fixture(scope="module")
def control(backend):
    with ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control:
        yield control


@pytest.fixture
def reference(control, trainer):
    client = ReconnectableClient(control.jobs, trainer, MODEL, base_only=True)
    reference = CountingReference(client, timeout_s=30)
    yield reference
    Reference.close(reference)


def opened(home):
    return ReferenceCache.open(home, model_fingerprint="model", data_fingerprint="data")


def filler(cache, reference, pairs, concurrency=4, batch_size=1):
    return ReferenceFiller(cache, reference, pairs, concurrency=concurrency, batch_size=batch_size, timeout_s=30)


def filled(home, reference, pairs, **sizes):
    """The cache's file after all pairs were computed."""
    cache = opened(home)
    with filler(cache, reference, pairs, **sizes) as work:
        assert work.join(60)
        assert work.is_complete
    return cache.path.read_text().splitlines()


def digests(cache):
    return [json.loads(line)["pair"] for line in cache.path.read_text().splitlines()[1:]]


def test_logprobs_are_summed_over_the_response_only(tmp_path, reference):
    pairs = [*make_pairs(3), make_pair([256, 1, 2], [9], [8, 7])]
    cache = opened(tmp_path)
    with filler(cache, reference, pairs) as work:
        found = work.references(pairs[2:], 30)
    for pair, sums in zip(pairs[2:], found, strict=True):
        for side, logprob in ((pair.chosen, sums.chosen), (pair.rejected, sums.rejected)):
            (targets,) = reference.logprobs([pair_side(side)])
            start = pair.prompt_tokens - 1  # in target coordinates
            assert logprob == pytest.approx(float(np.float64(targets[start:]).sum()), abs=1e-4)


def pair_side(side):
    return datum_from_row(side.tokens, side.weights)


def test_the_numbers_are_the_same_bits_whatever_the_concurrency(tmp_path, reference):
    pairs = make_pairs(11)
    for batch_size in (1, 3):
        alone = filled(tmp_path / f"{batch_size}-1", reference, pairs, concurrency=1, batch_size=batch_size)
        many = filled(tmp_path / f"{batch_size}-5", reference, pairs, concurrency=5, batch_size=batch_size)
        assert alone == many
        assert len(alone) == 12


def test_exactly_the_concurrency_is_in_flight(tmp_path, reference):
    filled(tmp_path, reference, make_pairs(10), concurrency=3, batch_size=2)
    assert (reference.num_requests, reference.most_in_flight) == (5, 3)


def test_pairs_are_taken_lazily(tmp_path, reference):
    taken = []
    release = threading.Event()

    def pairs():
        for number, pair in enumerate(make_pairs(30)):
            taken.append(number)
            if number == 6:
                assert release.wait(30)
            yield pair

    # The first four fill the window, and each one more needs an answer.
    with filler(opened(tmp_path), reference, pairs(), concurrency=4) as work:
        wait_until(lambda: len(taken) == 7)
        assert work.num_computed == 3
        assert not work.is_complete
        assert not work.join(0.01)
        release.set()
        assert work.join(60)


def test_a_second_run_sends_nothing_and_a_resumed_one_only_what_is_missing(tmp_path, reference):
    pairs = make_pairs(6)
    first = filled(tmp_path, reference, pairs[:4])
    reference.num_requests = 0
    whole = filled(tmp_path, reference, [*pairs, pairs[0], pairs[5]])
    assert whole[:5] == first
    assert reference.num_requests == 2
    assert filled(tmp_path, reference, pairs) == whole
    assert reference.num_requests == 2


def test_what_is_waited_for_is_computed_next(tmp_path, reference):
    pairs = make_pairs(20)
    cache = opened(tmp_path)

    def held_back():
        yield pairs[0]
        wait_until(lambda: work and work[0]._wanted)
        yield from pairs[1:]

    work = []
    with filler(cache, reference, held_back(), concurrency=2) as started:
        work.append(started)
        found = started.references([pairs[17], pairs[15]], 30)
        assert started.join(60)
    order = [[pair.digest for pair in pairs].index(digest) for digest in digests(cache)]
    assert order == [0, 15, 17, *range(1, 15), 16, 18, 19]
    assert found == [cache[pairs[17].digest], cache[pairs[15].digest]]


def test_an_error_in_the_background_reaches_who_waits(tmp_path, reference):
    bad = make_pair([256, 1], [100_000], [2])
    with filler(opened(tmp_path), reference, [*make_pairs(1), bad]) as work:
        with pytest.raises(RequestRejected, match="100000"):
            work.references([bad], 30)
        with pytest.raises(RequestRejected, match="100000"):
            work.join(30)
        assert not work.is_complete

    def broken():
        yield from make_pairs(1)
        raise DataError("row 7 cannot be rendered.")

    with filler(opened(tmp_path / "other"), reference, broken()) as work:
        with pytest.raises(DataError, match="row 7"):
            work.references(make_pairs(3), 30)
        assert reference.logprobs([pair_side(bad.rejected)])  # the session is as it was


def test_waiting_ends_with_its_deadline_with_the_filler_and_for_a_pair_that_never_comes(tmp_path, reference):
    pairs = make_pairs(3)
    release = threading.Event()

    def held_back():
        yield pairs[0]
        assert release.wait(30)

    with filler(opened(tmp_path), reference, held_back(), concurrency=1) as work:
        with pytest.raises(TrainerLost, match=r"1 of 2 pairs were not there within 0.3 s \(1 computed"):
            work.references(pairs[:2], 0.3)
        closing = threading.Timer(0.2, lambda: (setattr(work, "_is_closed", True), release.set(), work.close()))
        closing.start()
        with pytest.raises(TrainerLost, match="closed"):
            work.references(pairs[:2], 30)
        closing.join()
    assert not work.is_complete
    with filler(opened(tmp_path), reference, pairs[:2]) as work:
        assert work.references(pairs[:2], 30)
        with pytest.raises(DataError, match=f"not given the pairs .*{pairs[2].digest}"):
            work.references(pairs, 30)


def test_a_lost_session_is_opened_again_and_nothing_is_computed_twice(tmp_path, reference):
    pairs = make_pairs(8)

    def losing():
        for number, pair in enumerate(pairs):
            if number in (3, 6):
                reference._client._loss("its session was closed by the trainer")
            yield pair

    lines = filled(tmp_path / "lost", reference, losing(), concurrency=3)
    assert lines == filled(tmp_path / "other", reference, pairs, concurrency=1)
    assert reference._client.num_sessions == 3


def test_a_reference_that_is_closed_meanwhile_is_not_opened_again(tmp_path, reference):
    def closing():
        yield from make_pairs(1)
        Reference.close(reference)
        yield from make_pairs(3)

    with (
        filler(opened(tmp_path), reference, closing(), concurrency=1) as work,
        pytest.raises(TrainerLost, match="closed"),
    ):
        work.references(make_pairs(3), 30)
    assert reference._client.num_sessions == 1


def test_closing_the_filler_closes_its_reference_and_waits_for_no_answer(tmp_path, reference):
    reference.is_closed_with_filler = True
    work = filler(opened(tmp_path), reference, make_pairs(200), concurrency=8)
    wait_until(lambda: work.num_computed > 0)
    started = time.monotonic()
    work.close()
    assert time.monotonic() - started < 5
    assert not work._thread.is_alive()
    with pytest.raises(TrainerLost):
        reference.logprobs([pair_side(make_pairs(1)[0].chosen)])


def test_a_trainer_that_is_gone_ends_the_work_and_its_half_is_kept(tmp_path, control, start_trainer):
    job = start_trainer("doomed-reference")
    pairs = make_pairs(40)
    cache = opened(tmp_path)

    def pairs_then_death():
        yield from pairs[:20]
        os.kill(control.job(job)["metadata"]["workerPid"], signal.SIGKILL)
        yield from pairs[20:]

    client = ReconnectableClient(control.jobs, job, MODEL, base_only=True, default_timeout_s=10)
    with (
        Reference(client, timeout_s=10) as reference,
        filler(cache, reference, pairs_then_death()) as work,
        pytest.raises(TrainerLost, match="doomed-reference"),
    ):
        work.references(pairs, 30)
    control.delete(job)
    assert digests(opened(tmp_path)) == [pair.digest for pair in pairs[: len(cache)]]
    assert 16 <= len(cache) <= 20


def wait_until(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
