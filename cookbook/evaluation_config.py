"""The config of an evaluation: one model, or two side by side, on rows of one data set. Light: no model is loaded.

What the files and names in it point at is checked here too; the rows are checked in cookbook/evaluation/rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from cookbook.config import (
    BACKENDS,
    ConcurrencyConfig,
    Config,
    DeployConfig,
    Environment,
    InfraConfig,
    RetryConfig,
    WandBConfig,
    environment,
)
from cookbook.errors import ConfigError, DataError, ModelError, Problem
from cookbook.models.folders import HUB_NAME, find_folder
from cookbook.rewards.load import spec_problem
from cookbook.rewards.reasoning import PREFIX, parse_spec
from cookbook.validation import check_data_file, check_folder, check_wandb, read_config

__all__ = ["AGAINST", "MODEL", "EvaluationConfig", "evaluation_input_problems", "load_evaluation_config"]

MODEL, AGAINST = "model", "against"
"""The two roles that a model can have in an evaluation; also the names of their fields."""

FREE_FIELDS = ("concurrency", "deployment", "infra", "log_path", "retry", "reward_timeout_s", "timeout_s", "wandb")
"""Fields that may differ when an evaluation goes on, or its result is read again: they change none of its numbers. What
`served` takes out of deployment and infra does, and must be the same."""


def _one_of_the_backends(value: str) -> str:
    if value not in BACKENDS:
        raise ValueError(f"must be one of {', '.join(BACKENDS)}")
    return value


class EvaluationConfig(Config):
    """Evaluation of a model, or of two side by side: held-out loss, reward, pass@k and win rate, with intervals.

    Rows are `{"messages": [...], ...}`. An assistant message at the end is the reference answer: the loss is measured
    on it, and it is cut off before the models answer.
    """

    recipe: ClassVar[str] = "eval"

    log_path: str = Field(
        min_length=1, description="Run directory: the report and every answer. The same one again gives the result."
    )
    model: str = Field(
        min_length=1,
        description="Model to evaluate: a name of `cookbook models list`, a local folder (a LoRA adapter too), or a "
        "model resource of the backend. With deployment.deployment_id, the model that this deployment was made of.",
    )
    against: str | None = Field(
        None, description="Second model, which answers the same rows with the same seeds. None = one model only."
    )
    dataset: str = Field(
        min_length=1, description="JSONL file with the rows, or a procedural task, reasoning_gym:NAME?option=value."
    )
    reward: str | None = Field(
        None,
        description="What an answer is worth: a ready reward (exact, numeric, math, countdown, format:REGEX, "
        "reasoning_gym:NAME?option=value) or your own as module:function. None = answers are not scored.",
    )
    judge: str | None = Field(
        None,
        description="Who wins, as module:function of (row, answer, other), from 0 (other) to 1 (answer). None = the "
        "higher reward wins, and a tie is half a win.",
    )
    samples_per_row: int = Field(1, ge=1, le=1024, description="Answers to each row.")
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1], description="The k of each pass@k: the chance that one of k answers is right."
    )
    pass_threshold: float = Field(1.0, description="An answer is right when its reward is at least this.")
    temperature: float | None = Field(
        None, ge=0, le=10, description="Sampling temperature. None = 0 (greedy) for one answer a row, 1.0 for more."
    )
    max_completion_tokens: int = Field(512, ge=1, description="Longest answer in tokens.")
    stop: list[str] | None = Field(None, description="Texts that end an answer, beside the model's own end.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the answers and of the intervals.")
    max_rows: int | None = Field(None, ge=1, description="Use only the first N rows. None = all.")
    max_seq_len: int | None = Field(
        None,
        ge=2,
        description="Longest row in tokens, its answer included. A longer one is an error. None = the context length "
        "of the shape or model.",
    )
    bootstrap_samples: int = Field(2000, ge=100, le=1_000_000, description="Resamples of the rows behind an interval.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Share of the resamples that an interval holds.")
    reward_timeout_s: float = Field(30.0, gt=0, description="Seconds for the reward or the judge of one answer.")
    timeout_s: int = Field(24 * 3600, gt=0, description="Seconds for all answers of one model.")
    tokenizer_model: str | None = Field(
        None, description="Model name or folder of the tokenizer of both models. None = each model's own."
    )
    backend: Annotated[str, AfterValidator(_one_of_the_backends)] = Field(
        "embedded",
        description="Where the models are deployed: embedded = a server on this machine; fireworks = Fireworks (key "
        "from FIREWORKS_API_KEY or the Secret block fireworks-api-key).",
        json_schema_extra={"enum": list(BACKENDS)},
    )
    deployment: DeployConfig = Field(
        default_factory=DeployConfig,
        description="Deployments of the models. A deployment_id is adopted for `model`; `against` gets one of its own.",
    )
    infra: InfraConfig = Field(
        default_factory=InfraConfig, description="Its training shape tells the deployment shape, where none is set."
    )
    concurrency: ConcurrencyConfig = Field(default_factory=ConcurrencyConfig, description="Requests in flight.")
    retry: RetryConfig = Field(default_factory=RetryConfig, description="Retries of requests and of deployments.")
    wandb: WandBConfig = Field(default_factory=WandBConfig, description="Weights & Biases.")

    @property
    def models(self) -> dict[str, str]:
        """Role -> model, "model" first."""
        return {MODEL: self.model} | ({} if self.against is None else {AGAINST: self.against})

    @property
    def sampling_temperature(self) -> float:
        """The temperature that answers are sampled at."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples_per_row == 1 else 1.0

    @property
    def wants_answers(self) -> bool:
        """Whether anything is done with answers: they are scored, or compared. Else only the loss is measured."""
        return self.reward is not None or self.against is not None

    def tokenizer_of(self, role: str) -> str:
        """Model name or folder of the tokenizer of the model in this role."""
        return self.deployment.tokenizer_model or self.tokenizer_model or self.models[role]

    def deployment_of(self, role: str) -> DeployConfig:
        """The deployment to ask for; one that is adopted serves `model` only."""
        return self.deployment if role == MODEL else self.deployment.model_copy(update={"deployment_id": None})

    def numbers(self) -> dict[str, Any]:
        """The fields that change the result, as JSON data."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if name not in FREE_FIELDS} | {
            "deployment.tokenizer_model": self.deployment.tokenizer_model,
            **self.served(MODEL),
            **(self.served(AGAINST) if self.against is not None else {}),
        }

    def served(self, role: str) -> dict[str, Any]:
        """All that changes what the model in `role` says, apart from its weights, as JSON data.

        The number of threads is left out: it moves the last bits only.
        """
        deployment = self.deployment_of(role)
        if deployment.deployment_id is not None:  # somebody else has decided the rest
            return {"deployment.deployment_id": deployment.deployment_id}
        accelerator = deployment.deployment_accelerator_type
        shape = deployment.deployment_shape or (self.infra.training_shape_id if accelerator is None else None)
        arguments = deployment.deployment_extra_args or []
        return {
            "deployment.deployment_shape": shape,
            "deployment.deployment_accelerator_type": accelerator,
            "deployment.deployment_extra_args": [each for each in arguments if not each.startswith("--threads=")],
            "deployment.extra_values": deployment.extra_values,
        }

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = [*self._sampling_problems(), *self._comparison_problems(), *self._backend_problems()]
        if problems:
            raise ConfigError(problems)
        return self

    def _sampling_problems(self) -> list[Problem]:
        problems = []
        too_large = [k for k in self.pass_at if k > self.samples_per_row]
        if too_large:
            what = f"{too_large[0]} is above samples_per_row={self.samples_per_row}: pass@k needs at least k answers."
            problems.append(Problem("pass_at", what, "Raise samples_per_row, or lower it."))
        if len(set(self.pass_at)) < len(self.pass_at):
            problems.append(Problem("pass_at", f"names a number twice: {self.pass_at}.", "Name each once."))
        if self.temperature == 0 and self.samples_per_row > 1:
            what = f"is 0, so all samples_per_row={self.samples_per_row} answers to a row would be the same."
            problems.append(Problem("temperature", what, "Raise it, or set samples_per_row to 1."))
        if self.reward is None:
            for name in ("pass_at", "pass_threshold"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].get_default(call_default_factory=True):
                    what = f"is {value}, but there is no reward: nothing tells a right answer."
                    problems.append(Problem(name, what, "Set reward, or remove it."))
        return problems

    def _comparison_problems(self) -> list[Problem]:
        if self.against is None:
            if self.judge is None:
                return []
            what = f"is {self.judge!r}, but there is no second model to compare with."
            return [Problem("judge", what, "Set against, or remove it.")]
        if self.against == self.model and self.deployment.deployment_id is None:
            what = f"is {self.against!r}, the same as model: it would give the same answers."
            return [Problem("against", what, "Name another model, or remove it.")]
        return []

    def _backend_problems(self) -> list[Problem]:
        if self.backend != "fireworks":
            return []
        problems = []
        if self.tokenizer_model is None and self.deployment.tokenizer_model is None:
            what = "is None: rows are tokenized on this machine, and the model is a resource of the backend."
            problems.append(Problem("tokenizer_model", what, "Set it to a Hugging Face model name or folder."))
        for role, name in self.models.items():
            if not name.startswith("accounts/"):
                what = f"{name!r} is not a model resource, and backend is 'fireworks'."
                problems.append(Problem(role, what, "Write accounts/<account>/models/<model>."))
        shape, accelerator = self.deployment.deployment_shape, self.deployment.deployment_accelerator_type
        is_adopted = self.deployment.deployment_id is not None and self.against is None
        if not any((shape, accelerator, self.infra.training_shape_id, is_adopted)):
            what = "neither deployment_shape nor deployment_accelerator_type is set, with backend 'fireworks'."
            problems.append(Problem("deployment", what, "Set deployment.deployment_shape."))
        return problems


def load_evaluation_config(
    *, file: Path | None = None, sets: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> EvaluationConfig:
    """The config out of a YAML file, then `sets` ("key=value"), then `overrides`; what comes later wins.

    Raises:
        ConfigError: every problem of the sources, the fields, the rules and what the config names, together.
    """
    config, problems, stand_ins = read_config(EvaluationConfig, file=file, sets=sets, overrides=overrides)
    if "backend" in stand_ins:  # which models there are depends on it
        stand_ins |= {MODEL, AGAINST, "tokenizer_model"}
    inputs = evaluation_input_problems(config, environment())
    problems += [problem for problem in inputs if problem.where not in stand_ins]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def evaluation_input_problems(config: EvaluationConfig, env: Environment) -> list[Problem]:
    """Problems of the files, models and rewards that `config` names. Cheap: nothing is loaded or downloaded."""
    problems = [*check_folder("log_path", config.log_path), *_data_problems(config.dataset)]
    for where, spec in (("reward", config.reward), ("judge", config.judge)):
        problem = None if spec is None else _function_problem(where, spec)
        problems += [Problem(where, problem, "")] if problem is not None else []
    return [*problems, *_model_problems(config, env.home / "models"), *check_wandb(config.wandb, env)]


def _data_problems(name: str) -> list[Problem]:
    if not name.startswith(PREFIX):
        return check_data_file("dataset", name)
    try:
        parse_spec(name)
    except DataError as error:
        return [Problem("dataset", str(error), "")]
    return []


def _function_problem(where: str, spec: str) -> str | None:
    is_reward_name = ":" not in spec or spec.startswith((PREFIX, "format:"))
    if where == "judge" and is_reward_name:
        return f"{spec!r} is not a judge. Write module:function."
    return spec_problem(spec)


def _model_problems(config: EvaluationConfig, models_dir: Path) -> list[Problem]:
    if config.backend != "embedded":
        return []
    named = {**config.models, "tokenizer_model": config.tokenizer_model}
    named["deployment.tokenizer_model"] = config.deployment.tokenizer_model
    problems = []
    for where, name in named.items():
        if name is None or (HUB_NAME.fullmatch(name) and not Path(name).is_dir()):
            continue
        try:
            find_folder(name, models_dir, hub_patterns=())
        except ModelError as error:
            problems.append(Problem(where, f"{error}", ""))
    return problems
