"""The steps of an evaluation: deploy a model, measure its loss, have it answer, free it; then who wins."""

from __future__ import annotations

import time
from statistics import fmean

from cookbook.deadlines import Deadline
from cookbook.deployments import deploy_model
from cookbook.errors import ConfigError
from cookbook.evaluation.answers import Answer, Sampling, answer_rows, reference_losses
from cookbook.evaluation.rows import load_evaluation_data
from cookbook.evaluation.win_rate import Duel, judge_duels, reward_wins
from cookbook.evaluation_config import AGAINST, MODEL, evaluation_input_problems
from tasks.eval_run import EvalRun
from tasks.record import recorded

__all__ = [
    "judge_answers",
    "measure_loss",
    "preflight_evaluation",
    "provision_model",
    "release_model",
    "sample_answers",
]


@recorded(deadline=lambda config: 24 * 3600.0, retried=False)
def preflight_evaluation(run: EvalRun) -> None:
    """Check every input, render every row for each model, and try the reward and the judge.

    Raises:
        ConfigError: all problems together. A row that is too long is one of them; none is ever dropped. Or what an
            earlier start left is of another evaluation.
    """
    problems = evaluation_input_problems(run.config, run.env)
    if problems:
        raise ConfigError(problems)
    folder = run.directory.path / "data"
    run.data = load_evaluation_data(run.config, run.env.home / "models", folder, shape_context=run.shape_context())
    references = len(run.data.references(MODEL))
    run.check_kept()
    config = run.config
    answers = f"{config.samples_per_row} answers to each row at temperature {config.sampling_temperature:g}, seed "
    answers = f"{answers}{config.seed}" if config.wants_answers else "no answers, as nothing is measured on them"
    run.say(f"{run.data.num_rows:,} rows, {references:,} with a reference answer; {answers}")


@recorded(deadline=lambda config: config.deployment.deployment_timeout_s, retried=True, persist=True)
def provision_model(run: EvalRun, role: str) -> dict[str, str]:
    """Have the model in `role` deployed; return the deployment's identity, {} when all its answers are there already.

    Raises:
        ProvisioningError: the deployment failed, or was not ready in time.
        ModelError: it is an adopted one, and serves another snapshot than in an earlier start.
    """
    if run.is_measured(role):
        return {}
    started, config = time.monotonic(), run.config
    deployment = deploy_model(
        run.control,
        run.ledger,
        run.served(role),
        config.deployment_of(role),
        run_id=run.directory.run_id,
        role=role,
        deadline=Deadline(config.deployment.deployment_timeout_s),
        training_shape_id=config.infra.training_shape_id,
    )
    run.sample_from(deployment)
    version = run.check_version(role)
    what = f"{config.models[role]} with snapshot {version}" if version else config.models[role]
    run.say(f"{what} is deployed ({time.monotonic() - started:.1f} s)")
    return {"deployment_id": deployment.deployment_id}


@recorded(deadline=lambda config: config.timeout_s, retried=True, persist=True)
def measure_loss(run: EvalRun, role: str) -> float | None:
    """Loss of the model in `role` on the reference answers, in nats a token; None where there are none.

    Raises:
        SamplingError: a row could not be measured.
        ModelError: another snapshot was hot loaded meanwhile.
    """
    losses = run.losses(role)
    if losses is None:
        version = run.check_version(role)
        references = run.data.references(role)
        counted = run.counter("reference answers", len(references))
        losses = (
            reference_losses(run.sampler, references, timeout_s=run.config.timeout_s, on_row=counted)
            if references
            else []
        )
        run.check_same_version(role, version, run.check_version(role))
        run.keep_losses(role, losses, version)
    if not losses:
        return None
    loss = sum(each.nats for each in losses) / sum(each.num_tokens for each in losses)
    run.say(f"{run.config.models[role]}: loss {loss:.4f} nats a token on {len(losses):,} reference answers")
    return loss


def sample_answers(run: EvalRun, role: str) -> None:
    """Have the model in `role` answer every row, where anything is measured on answers."""
    if run.config.wants_answers:
        answer_every_row(run, role)


@recorded(deadline=lambda config: config.timeout_s, retried=True, persist=True)
def answer_every_row(run: EvalRun, role: str) -> dict[str, float]:
    """Every answer of the model in `role`, scored and on disk; return their number and mean reward.

    Raises:
        SamplingError: a row could not be answered. What was answered is kept.
        RewardError: the reward failed.
        ModelError: another snapshot was hot loaded meanwhile.
    """
    config, rows, wanted = run.config, run.data.rows[role], run.wanted_answers(role)
    with run.answer_file(role) as file:
        done = [which for which in wanted if which in file.answers]
    version = run.check_version(role) if len(done) < len(wanted) else ""
    sampling = Sampling(
        max_tokens=config.max_completion_tokens,
        temperature=config.sampling_temperature,
        stop=tuple(config.stop or ()),
        samples_per_row=config.samples_per_row,
        seed=config.seed,
        reward_timeout_s=config.reward_timeout_s,
        version=version,
    )
    with run.answer_file(role) as file:
        counted = run.counter("answers", len(wanted), done=len(done))

        def keep(answer: Answer) -> None:
            run.check_same_version(role, version, answer.version)
            file.add(answer)
            counted()

        if len(done) < len(wanted):
            answer_rows(
                run.sampler, rows, run.data.reward, sampling, timeout_s=config.timeout_s, done=set(done), on_answer=keep
            )
            run.check_version(role)
        answers = [file.answers[which] for which in wanted]
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    found = {"answers": float(len(wanted))} | ({"reward": fmean(rewards)} if rewards else {})
    run.say(f"{config.models[role]}: {', '.join(f'{name} {value:g}' for name, value in found.items())}")
    return found


def release_model(run: EvalRun) -> None:
    """Free the model's deployment, so that the next one has the hardware to itself."""
    run.release()


def judge_answers(run: EvalRun) -> None:
    """Say who wins each pair of answers, where there are two models and something tells."""
    if run.config.against is not None and (run.data.judge is not None or run.data.reward is not None):
        compare(run)


@recorded(deadline=lambda config: config.timeout_s, retried=False)
def compare(run: EvalRun) -> None:
    """Answer by answer under the same seed: the judge says who wins, else the reward.

    Raises:
        RewardError: the judge failed. What it said until then is kept.
    """
    results, config, judge = run.results(), run.config, run.data.judge
    pairs = [
        (result.index, place, answer, other)
        for place, result in enumerate(results)
        for answer, other in zip(result.answers[MODEL], result.answers[AGAINST], strict=True)
    ]
    if judge is None:
        values = [reward_wins(answer.reward or 0.0, other.reward or 0.0) for _, _, answer, other in pairs]
    else:
        rows = run.data.rows[MODEL]
        duels = [
            Duel(rows[place].fields, answer.text, other.text, f"row {index}, answer {answer.sample}")
            for index, place, answer, other in pairs
        ]
        with run.verdict_file() as kept:
            values = judge_duels(
                judge, duels, reward_timeout_s=config.reward_timeout_s, timeout_s=config.timeout_s, kept=kept
            )
    size = config.samples_per_row
    run.wins = [values[start : start + size] for start in range(0, len(values), size)]
