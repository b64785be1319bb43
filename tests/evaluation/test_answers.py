"""Answers to rows: how they are asked for, scored and kept. The policy is a function here."""

import asyncio
from dataclasses import dataclass, field

import pytest

from cookbook.errors import ConfigError, RewardError, SamplingError
from cookbook.evaluation.answers import Answer, AnswerFile, Sampling, answer_rows, reference_losses
from cookbook.evaluation.rows import Reference
from cookbook.evaluation.win_rate import Duel, Judge, VerdictFile, judge_duels, load_judge, try_judge
from cookbook.rewards import LoadedReward, Reward
from cookbook.rollouts.ledger import sampling_seed
from cookbook.rollouts.sampler import Sampled


@dataclass
class Row:
    index: int
    prompt_tokens: tuple = (1, 2)
    messages: tuple = ({"role": "user", "content": "2?"},)
    fields: dict = field(default_factory=dict)


class Echo:
    """Answers with its seed; gives every token the logprob -0.5 x its number."""

    def __init__(self, broken=None):
        self.asked, self.broken = [], broken

    async def complete(self, prompt_tokens, **options):
        self.asked.append(options)
        return Sampled((5,) * 3, (0.0,) * 3, (0.0,) * 3, "length", str(options["seed"]), options["version"])

    async def token_logprobs(self, tokens, *, where):
        if where == self.broken:
            raise SamplingError(f"{where} cannot be sampled")
        return tuple(-0.5 * token for token in tokens[1:])

    def run(self, coroutine, timeout_s=None):
        return asyncio.run(coroutine)


def even(completion, row):
    return Reward(float(int(completion) % 2 == 0), {"length": len(completion)})


SAMPLING = Sampling(max_tokens=7, temperature=0.7, stop=("!",), samples_per_row=3, seed=11)


def test_every_answer_has_the_seed_of_its_row_and_number_as_in_a_rollout():
    policy = Echo()
    answers = answer_rows(policy, [Row(4), Row(9)], LoadedReward("even", even), SAMPLING, timeout_s=5)
    wanted = [(index, sample) for index in (4, 9) for sample in range(3)]
    assert [(answer.index, answer.sample) for answer in answers] == wanted
    assert [int(answer.text) for answer in answers] == [sampling_seed(11, *which) for which in wanted]
    assert [answer.reward for answer in answers] == [float(int(answer.text) % 2 == 0) for answer in answers]
    assert {(asked["temperature"], asked["max_tokens"], asked["stop"]) for asked in policy.asked} == {(0.7, 7, ("!",))}


def test_an_answer_says_which_snapshot_gave_it():
    sampling = Sampling(max_tokens=7, temperature=0.0, version="step-4")
    assert [answer.version for answer in answer_rows(Echo(), [Row(4)], None, sampling, timeout_s=5)] == ["step-4"]


def test_without_a_reward_nothing_is_scored_and_what_is_done_is_not_asked_again():
    policy = Echo()
    answers = answer_rows(policy, [Row(4)], None, SAMPLING, timeout_s=5, done={(4, 0), (4, 2)})
    assert [(answer.sample, answer.reward) for answer in answers] == [(1, None)]
    assert len(policy.asked) == 1


def test_answers_are_kept_one_by_one_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    first, second = (
        Answer(3, "?", "a", 1.0, 2, "stop", 0, {"x": 1.0}),
        Answer(3, "?", "b\u2028", None, 2, "stop", 1, {}, "s"),
    )
    one = {"weights": "one", "stop": ("!",)}
    with AnswerFile(path, one) as file:
        file.add(first)
        file.add(second)
    with path.open("ab") as torn:
        torn.write(b'{"index": 5, "pro')
    with AnswerFile(path, one) as file:
        assert file.answers == {(3, 0): first, (3, 1): second}
        file.add(Answer(4, "?", "c", 0.0, 1, "length"))
    with AnswerFile(path, one) as file:
        assert len(file.answers) == 3


def test_answers_of_another_model_are_neither_mixed_in_nor_lost(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, {"weights": "old", "seed": 1}):
        pass
    with AnswerFile(path, {"weights": "one", "seed": 1}) as file:  # nothing was answered, nothing is lost
        file.add(Answer(3, "?", "a", 1.0, 2, "stop"))
        with AnswerFile(path, {"weights": "one", "seed": 1}) as again:
            assert len(again.answers) == 1
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        AnswerFile(path, {"weights": "two", "seed": 1})
    assert [problem.where for problem in caught.value.problems] == ["weights", "log_path"]
    path.write_bytes(b'{"fingerprint": "of an older version"}\n' + before.splitlines()[1])
    with pytest.raises(ConfigError, match=r"weights: is 'one', but .* was made with None"):
        AnswerFile(path, {"weights": "one"})
    assert before.splitlines()[1] in path.read_bytes()


def test_the_loss_of_a_reference_answer_counts_its_tokens_only():
    rows = [Reference(2, (9, 4, 6, 8), (0.0, 0.0, 1.0, 1.0), "ab"), Reference(5, (9, 2), (0.0, 1.0), "c")]
    counted = []
    losses = reference_losses(Echo(), rows, timeout_s=5, on_row=lambda: counted.append(1))
    assert [(loss.index, loss.nats, loss.num_tokens) for loss in losses] == [(2, 7.0, 2), (5, 1.0, 1)]
    assert len(counted) == 2


def test_a_reference_answer_that_cannot_be_measured_is_an_error_that_names_it():
    rows = [Reference(2, (9, 4), (0.0, 1.0), "a"), Reference(5, (9, 2), (0.0, 1.0), "c")]
    with pytest.raises(SamplingError, match="row 5 cannot"):
        reference_losses(Echo(broken="the reference answer of row 5"), rows, timeout_s=5)
    impossible = [Reference(7, (9, float("inf")), (0.0, 1.0), "a")]
    with pytest.raises(SamplingError, match="row 7 has the logprob -inf"):
        reference_losses(Echo(), impossible, timeout_s=5)


# Judges -------------------------------------------------------------------------------------------------------------


async def longer(row, answer, other):
    await asyncio.sleep(0)
    return 0.5 if len(answer) == len(other) else float(len(answer) > len(other))


def duels(*pairs):
    return [Duel({}, answer, other, f"row {n}") for n, (answer, other) in enumerate(pairs)]


def test_a_judge_may_be_a_coroutine_function_and_is_asked_once_a_pair():
    found = judge_duels(
        Judge("j", longer), duels(("aa", "b"), ("a", "bb"), ("a", "b")), reward_timeout_s=5, timeout_s=9
    )
    assert found == [1.0, 0.0, 0.5]


def test_a_judge_is_not_asked_again_what_it_has_said(tmp_path):
    asked, limits = [], {"reward_timeout_s": 5, "timeout_s": 9}

    def judge(row, answer, other):
        asked.append(answer)
        return 1 / 0 if answer == "x" else float(answer == "a")

    def judged(pairs, name="j"):
        with VerdictFile(tmp_path / "verdicts.jsonl", Judge(name, judge)) as kept:
            return judge_duels(Judge(name, judge), duels(*pairs), **limits, kept=kept)

    assert judged([("a", "b")]) == [1.0]
    with pytest.raises(RewardError, match="row 1 raised"):
        judged([("a", "b"), ("x", "b")])
    assert judged([("a", "b"), ("c", "b")]) == [1.0, 0.0]
    assert asked == ["a", "x", "c"]
    assert judged([("a", "other")]) == [1.0]  # another duel
    assert asked == ["a", "x", "c", "a"]
    with pytest.raises(ConfigError, match="judge: is 'k', but"):
        judged([("a", "b")], name="k")


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_a_judge_must_give_a_number_from_0_to_1(value):
    with pytest.raises(RewardError, match=f"judge 'j' of row 0 gave {value:g}"):
        judge_duels(Judge("j", lambda row, answer, other: value), duels(("", "")), reward_timeout_s=5, timeout_s=9)
    with pytest.raises(RewardError, match="gave"):
        try_judge(Judge("j", lambda row, answer, other: value), {}, 5.0, where="row 0")


def test_a_judge_that_raises_is_named_with_its_row():
    with pytest.raises(RewardError, match=r"judge j.* of row 1 raised ZeroDivisionError"):
        judge_duels(
            Judge("j", lambda row, answer, other: 1 / (answer != "x")),
            duels(("a", "b"), ("x", "b")),
            reward_timeout_s=5,
            timeout_s=9,
        )


def test_a_judge_that_hangs_is_ended_by_its_limit():
    async def hangs(row, answer, other):
        await asyncio.sleep(60)

    with pytest.raises(RewardError, match="did not return within"):
        judge_duels(Judge("j", hangs), duels(("a", "b")), reward_timeout_s=0.05, timeout_s=9)
    with pytest.raises(RewardError, match="had not judged all 1 pairs"):
        judge_duels(Judge("j", hangs), duels(("a", "b")), reward_timeout_s=9, timeout_s=0.05)


def test_what_is_no_judge_is_refused():
    assert load_judge("tests.evaluation.test_answers:longer").name.endswith(":longer")
    with pytest.raises(RewardError, match="cannot be called with a row and two answers"):
        load_judge("tests.evaluation.test_answers:even")
