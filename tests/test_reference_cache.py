"""Reference logprobs on disk: what is kept, what is refused, and what a crash or another process leaves."""

import json
import subprocess
import sys
import time

import pytest

from cookbook.client import ReconnectableClient
from cookbook.control_plane import ControlPlane
from cookbook.data.pair_datums import pair_datums
from cookbook.errors import CheckpointError, DataError
from cookbook.losses.preference import PairReference
from cookbook.reference_cache import ReferenceCache, check_reference_cache, pair_references
from tests.pairs import make_pairs
from tests.running_backend import MODEL

ONE, TWO, THREE = PairReference(-1.0, -2.5), PairReference(-3.0, -4.0), PairReference(-5.0, -1e-9)


def opened(home, model="model", data="data"):
    return ReferenceCache.open(home, model_fingerprint=model, data_fingerprint=data, base_model="tiny")


def with_one(home):
    cache = opened(home)
    cache.put({"a": ONE})
    return cache


def lines(cache):
    return cache.path.read_text().splitlines()


def test_what_was_put_is_found_again_exactly(tmp_path):
    cache = opened(tmp_path)
    assert (len(cache), cache.get("a"), "a" in cache) == (0, None, False)
    exact = PairReference(-0.1 - 0.2, -1 / 3)
    cache.put({"a": exact, "b": TWO})
    cache.put({"c": THREE})
    again = opened(tmp_path)
    assert len(again) == 3
    assert [again["a"], again["b"], again.get("c")] == [exact, TWO, THREE]
    header, *rows = map(json.loads, lines(again))
    identity = {"model_fingerprint": "model", "data_fingerprint": "data", "base_model": "tiny"}
    assert header == {"version": 1, **identity}
    assert rows[1] == {"pair": "b", "chosen": -3.0, "rejected": -4.0}
    with pytest.raises(DataError, match="no reference logprobs of pair d"):
        again["d"]


def test_each_model_and_each_data_set_has_a_cache_of_its_own(tmp_path):
    with_one(tmp_path)
    assert len(opened(tmp_path, model="other")) == len(opened(tmp_path, data="other")) == 0
    assert len(list(tmp_path.glob("reference_logprobs/*/pairs.jsonl"))) == 3


def test_an_entry_that_another_wrote_first_wins(tmp_path):
    mine, other = opened(tmp_path), opened(tmp_path)
    other.put({"a": ONE})
    mine.put({"a": TWO, "b": THREE})
    assert (mine["a"], mine["b"], len(lines(mine))) == (ONE, THREE, 3)
    other.put({})
    assert other["b"] == THREE
    with mine.path.open("a") as file:
        file.write(lines(mine)[1].replace("-1.0", "-9.0") + "\n")
    assert opened(tmp_path)["a"] == ONE


def test_a_torn_last_line_is_cut_also_by_who_has_the_file_open(tmp_path):
    cache = with_one(tmp_path)
    whole = cache.path.read_bytes()
    for torn in (b'{"pair": "b", "cho', b'{"pair": "b", "chosen": -1.0, "rejected": -2.0}'):  # without its line end
        cache.path.write_bytes(whole + torn)
        assert len(opened(tmp_path)) == 1
        assert cache.path.read_bytes() == whole
    cache.path.write_bytes(whole + b'{"pair')
    cache.put({"b": TWO})
    assert [opened(tmp_path)[name] for name in "ab"] == [ONE, TWO]


def test_a_header_that_was_never_finished_is_written_again(tmp_path):
    cache = opened(tmp_path)
    cache.path.write_bytes(cache.path.read_bytes()[:20])
    again = opened(tmp_path)
    again.put({"a": ONE})
    assert opened(tmp_path)["a"] == ONE


@pytest.mark.parametrize(
    "damage",
    [
        "not json",
        '{"pair": "b", "chosen": -1.0}',
        '{"pair": "b", "chosen": NaN, "rejected": -1.0}',
        '{"pair": 7, "chosen": -1.0, "rejected": -1.0}',
        "[]",
    ],
)
def test_a_damaged_line_is_named_with_what_to_do(tmp_path, damage):
    cache = with_one(tmp_path)
    with cache.path.open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(DataError, match=r"pairs.jsonl, line 3 is damaged: .* Delete the file"):
        opened(tmp_path)


def test_a_header_of_another_model_or_version_is_stale(tmp_path):
    cache = with_one(tmp_path)
    header, row = lines(cache)
    for name, value in (("model_fingerprint", "older"), ("data_fingerprint", "older"), ("version", 0)):
        cache.path.write_text(json.dumps(json.loads(header) | {name: value}) + f"\n{row}\n")
        with pytest.raises(DataError, match=rf"pairs.jsonl, line 1 is stale: .*{name} .* Delete the file"):
            opened(tmp_path)
    cache.path.write_text(f"{row}\n")
    with pytest.raises(DataError, match="line 1 does not begin with a header"):
        opened(tmp_path)


def test_a_file_that_became_shorter_in_use_is_not_written_to(tmp_path):
    cache = with_one(tmp_path)
    cache.path.write_text(lines(cache)[0] + "\n")
    with pytest.raises(DataError, match="has become shorter while it was in use"):
        cache.put({"b": TWO})
    assert len(lines(cache)) == 1


def test_a_logprob_that_is_not_finite_is_never_kept(tmp_path):
    cache = opened(tmp_path)
    with pytest.raises(DataError, match="not finite"):
        cache.put({"a": ONE, "b": PairReference(float("nan"), -1.0)})
    assert len(opened(tmp_path)) == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "reference_logprobs").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="reference_logprobs"):
        opened(tmp_path)


WRITER = """
import sys
from pathlib import Path
from cookbook.losses.preference import PairReference
from cookbook.reference_cache import ReferenceCache

home, who, count = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
cache = ReferenceCache.open(home, model_fingerprint="model", data_fingerprint="data", base_model="tiny")
print("open", flush=True)
for number in range(0, count, 4):
    cache.put({f"pair-{n}": PairReference(-who, -float(n)) for n in range(number, number + 4)})
print([cache[f"pair-{n}"].chosen for n in range(count)])
"""


def writer(home, who, count):
    command = [sys.executable, "-c", WRITER, str(home), str(who), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_write_the_same_pairs_use_the_same_numbers(tmp_path):
    answers = [process.communicate(timeout=60)[0] for process in [writer(tmp_path, 1, 200), writer(tmp_path, 2, 200)]]
    cache = opened(tmp_path)
    used = [cache[f"pair-{n}"].chosen for n in range(200)]
    assert [answer.splitlines()[1] for answer in answers] == [str(used)] * 2
    assert len(lines(cache)) == 201


def test_a_process_killed_while_it_writes_leaves_whole_entries(tmp_path):
    process = writer(tmp_path, 1, 100_000)
    assert process.stdout.readline() == "open\n"
    cache = opened(tmp_path)
    while len(cache) < 40:
        cache.put({})
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=10)
    again = opened(tmp_path)
    assert len(again) >= len(cache)
    assert all(again[f"pair-{n}"] == PairReference(-1.0, -float(n)) for n in range(len(again)))


@pytest.fixture
def client(backend, trainer):
    with (
        ControlPlane("embedded", backend.base_url, backend.api_key, backend.home / "models") as control,
        ReconnectableClient(control.jobs, trainer, MODEL, 4) as client,
    ):
        yield client


def test_a_cache_that_the_untrained_policy_contradicts_is_stale(tmp_path, client):
    pairs = make_pairs(3)
    cache = opened(tmp_path)
    assert check_reference_cache(cache, client, iter(pairs)) is None
    outputs = client.forward(pair_datums([pairs[1]]), "cross_entropy").loss_fn_outputs
    (true,) = pair_references([pairs[1]], [output["logprobs"].to_torch() for output in outputs])
    cache.put({pairs[1].digest: true})
    remaining = iter(pairs)
    assert check_reference_cache(cache, client, remaining) == 0
    assert next(remaining) is pairs[2]

    off = 0.11 * pairs[1].rejected.num_trained
    wrong = opened(tmp_path, model="other")
    wrong.put({pairs[1].digest: PairReference(true.chosen, true.rejected - off)})
    with pytest.raises(DataError, match=rf"pairs.jsonl is stale: .*{true.rejected - off:.4f}.* 0.11 nats a token"):
        check_reference_cache(wrong, client, pairs)
    assert check_reference_cache(wrong, client, pairs, tolerance=0.12) == pytest.approx(0.11)
