"""The configs of the recipes: frozen Pydantic models that a YAML file, `--set`, Python and a Prefect form fill alike.

A config holds what the user wrote, never run-time values. Fields keep the names, types and defaults of the public
cookbook reference; the choices of a `str` field are in its schema and checked. Environment variables are read in
this file and nowhere else on the client's side. Loading a file and naming all its problems: cookbook/validation.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cookbook.errors import ConfigError, Problem
from cookbook.mirror_url import refuse_credentials

__all__ = [
    "ADVANTAGES",
    "BACKENDS",
    "OUTPUT_MODEL_ID",
    "POLICY_LOSSES",
    "RECIPE_CONFIGS",
    "TRAIN_ON_WHAT",
    "AdamConfig",
    "CISPOConfig",
    "ConcurrencyConfig",
    "Config",
    "DAPOConfig",
    "DPOConfig",
    "DPOWeightSyncConfig",
    "DROConfig",
    "DeployConfig",
    "DeployedConfig",
    "Environment",
    "EvalConfig",
    "GSPOConfig",
    "InfraConfig",
    "ORPOConfig",
    "PreferenceConfig",
    "PreferenceEvalConfig",
    "RLConfig",
    "RLEvalConfig",
    "RecipeConfig",
    "RetryConfig",
    "RunnerConfig",
    "SFTConfig",
    "ScheduledConfig",
    "StorageConfig",
    "TISConfig",
    "WandBConfig",
    "WeightSyncConfig",
    "bypass_proxies",
    "environment",
    "set_prefect_defaults",
]

SHAPE_OWNED_FIELDS = ("accelerator_type", "accelerator_count", "node_count", "custom_image_tag")
DEPLOYMENT_SHAPE_OWNED_FIELDS = ("deployment_accelerator_type",)
OUTPUT_MODEL_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
CHECKPOINT_REFERENCE = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?:)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class _Choice:
    """Check of a string field against its choices; the field's annotation stays `str`."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def __call__(self, value: str | None) -> str | None:
        if value is not None and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}")
        return value


def _choice(default: str | None, description: str, *choices: str) -> Any:
    """A field of type `str` (or `str | None`) whose JSON schema lists its choices, so that a form shows a menu."""
    return Field(
        default, description=description, json_schema_extra={"enum": [*choices, *([None] if default is None else [])]}
    )


class Config(BaseModel):
    """Base of every block: frozen, unknown fields are errors, defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class InfraConfig(Config):
    """Trainer hardware. With `training_shape_id` set, the shape owns the accelerator, node count and image."""

    training_shape_id: str | None = Field(
        None,
        description="Full training-shape id of the policy trainer, accounts/ACCOUNT/trainingShapes/SHAPE. "
        "None = manual launch: CPU on the embedded backend; on fireworks accelerator_type and accelerator_count are then needed.",
    )
    ref_training_shape_id: str | None = Field(
        None,
        description="Full training-shape id of the reference trainer, where a recipe launches one. None = RL launches none, DPO takes training_shape_id.",
    )
    region: str | None = Field(None, description="Region. None = the training shape decides.")
    accelerator_type: str | None = Field(
        None, description="Accelerator type. Owned by the shape; only for a manual launch."
    )
    accelerator_count: int | None = Field(
        None, ge=1, description="Accelerators a node. Owned by the shape; only for a manual launch."
    )
    node_count: int | None = Field(
        None, ge=1, description="Trainer nodes. Owned by the shape; only for a manual launch."
    )
    custom_image_tag: str | None = Field(
        None, description="Trainer image tag. Owned by the shape; only for a manual launch."
    )
    trainer_timeout_s: float = Field(
        3600,
        gt=0,
        description="Seconds until a trainer must be ready: one deadline over waiting for capacity and starting.",
    )
    extra_args: list[str] | None = Field(
        None,
        description="Extra trainer arguments. The embedded trainer knows --compute-dtype=auto|float32|bfloat16 and --threads=N.",
    )
    purpose: str | None = Field(None, description="Purpose name passed to the trainer job.")

    @model_validator(mode="after")
    def _shape_owns_hardware(self) -> Self:
        overrides = [name for name in SHAPE_OWNED_FIELDS if getattr(self, name) is not None]
        if self.training_shape_id is not None and overrides:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in overrides)
            raise ValueError(
                f"{values} cannot be set together with training_shape_id={self.training_shape_id!r}: the shape owns "
                f"{'it' if len(overrides) == 1 else 'them'}. Remove {', '.join(overrides)}, or remove training_shape_id for a manual launch."
            )
        return self


class DeployConfig(Config):
    """Deployment for sampling and weight sync. With `deployment_shape` set, the shape owns hardware and serving config."""

    deployment_id: str | None = Field(
        None,
        description="Deployment to adopt; it is never deleted. None = one is derived from the base model and the run.",
    )
    tokenizer_model: str | None = Field(
        None, description="Model name or folder for client-side tokenization. Required for RL sampling."
    )
    deployment_shape: str | None = Field(
        None, description="Deployment shape resource name; owns hardware and serving config."
    )
    deployment_region: str | None = Field(None, description="Region. None = the shape decides.")
    deployment_accelerator_type: str | None = Field(
        None, description="Accelerator type, only without a deployment shape."
    )
    hot_load_bucket_type: str = Field(
        "FW_HOSTED", description="Storage of the snapshots that the deployment hot loads."
    )
    deployment_timeout_s: float = Field(5400, gt=0, description="Seconds until the deployment must be ready.")
    deployment_extra_args: list[str] | None = Field(None, description="Extra serving arguments.")
    sample_timeout: int = Field(600, gt=0, description="Seconds: HTTP read timeout of one sampling request.")
    disable_speculative_decoding: bool = Field(
        True, description="Disable speculative decoding, for compatibility with hot loads."
    )
    extra_values: dict[str, str] | None = Field(None, description="Extra deployment Helm values.")
    replica_count: int | None = Field(None, ge=1, description="Pin the deployment to this many replicas. None = 1.")

    @model_validator(mode="after")
    def _shape_owns_hardware(self) -> Self:
        overrides = [name for name in DEPLOYMENT_SHAPE_OWNED_FIELDS if getattr(self, name) is not None]
        if self.deployment_shape is not None and overrides:
            raise ValueError(
                f"deployment_accelerator_type={self.deployment_accelerator_type!r} cannot be set together with "
                f"deployment_shape={self.deployment_shape!r}: the shape owns it. Remove one of the two."
            )
        return self


class WeightSyncConfig(Config):
    """Intervals and deadlines of weight syncs and of distributed checkpoints (DCP)."""

    weight_sync_interval: int = Field(
        1, ge=0, description="Save and sync sampler weights every N optimizer steps. 0 = never."
    )
    dcp_save_interval: int = Field(
        0,
        ge=0,
        description="Save a DCP checkpoint to resume from every N optimizer steps. 0 = never: then a run that dies starts over.",
    )
    dcp_timeout: int = Field(2700, gt=0, description="Seconds for one DCP save or load.")
    first_checkpoint_type: Annotated[str, AfterValidator(_Choice(("base", "delta")))] = _choice(
        "base", "Type of the first sampler snapshot.", "base", "delta"
    )
    weight_sync_before_training: bool = Field(
        False, description="Save a base snapshot and hot load it before the first step."
    )
    weight_sync_timeout: int = Field(600, gt=0, description="Seconds for one hot load.")


class WandBConfig(Config):
    """Weights & Biases. Without a project nothing is sent; WANDB_MODE=offline keeps the run on disk."""

    entity: str | None = Field(None, description="W&B team or user name.")
    project: str | None = Field(None, description="W&B project name. None = W&B is off.")
    run_name: str | None = Field(None, description="W&B run name. None = made from the run id.")


class ConcurrencyConfig(Config):
    """How many sampling requests are in flight."""

    mode: Annotated[str, AfterValidator(_Choice(("adaptive", "fixed")))] = _choice(
        "adaptive",
        "adaptive = follow the server's prefill queue; fixed = exactly max_concurrency in flight.",
        "adaptive",
        "fixed",
    )
    initial_window: int | None = Field(
        None, ge=1, description="First window of the adaptive mode. None = 8 for each replica."
    )
    min_window: int = Field(1, ge=1, description="Smallest window of the adaptive mode.")
    max_window: int = Field(256, ge=1, description="Largest window of the adaptive mode.")
    max_concurrency: int | None = Field(None, ge=1, description="Requests in flight when mode is fixed.")
    prefill_queue_target: float = Field(
        0.5, gt=0, description="Seconds of prefill queue that the adaptive mode aims for."
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.mode == "fixed" and self.max_concurrency is None:
            raise ValueError(
                "max_concurrency is None, but mode is 'fixed'. Set max_concurrency, or mode to 'adaptive'."
            )
        if self.min_window > self.max_window:
            raise ValueError(
                f"min_window={self.min_window} is above max_window={self.max_window}. Swap or change them."
            )
        return self


class RunnerConfig(Config):
    """Files for an outer orchestrator. Each field falls back to its environment variable; None and unset = not written."""

    status_file: str | None = Field(
        None, description="JSON with status and progress, replaced as the run goes. Env: COOKBOOK_STATUS_FILE."
    )
    metadata_file: str | None = Field(
        None, description="JSON with tokens and accelerator-seconds, replaced. Env: COOKBOOK_METADATA_FILE."
    )
    metrics_file: str | None = Field(
        None, description="JSONL with the metrics of each step. Env: COOKBOOK_METRICS_FILE."
    )
    output_model_path: str | None = Field(
        None, description="JSON with the final model, written once. Env: COOKBOOK_OUTPUT_MODEL_PATH."
    )


class RetryConfig(Config):
    """Retries of idempotent work: provisioning, DCP saves, weight syncs, evaluation, promotion. A training step is never retried."""

    attempts: int = Field(4, ge=1, le=20, description="Attempts in all, the first one included. 1 = no retry.")
    initial_delay_s: float = Field(
        2.0, ge=0, description="Seconds before the second attempt; doubles with each further one."
    )
    max_delay_s: float = Field(60.0, ge=0, description="Seconds: longest pause between two attempts.")
    jitter: float = Field(
        0.25, ge=0, le=1, description="Share of the pause that is random, so that many runs do not retry in step."
    )
    deadline_s: float = Field(
        0, ge=0, description="Seconds over all attempts and pauses. 0 = bounded only by the attempts' own deadlines."
    )
    restores: int = Field(
        3,
        ge=0,
        le=100,
        description="How often in a row, without a further commit, a run goes back to its last commit by itself when its trainer or deployment is lost. 0 = it ends, and the next start resumes.",
    )

    def delay(self, failures: int) -> float:
        """Pause after so many failures in a row (1, 2, ...), in seconds, without jitter."""
        return min(self.initial_delay_s * 2.0 ** (failures - 1), self.max_delay_s)

    def delays(self) -> list[float]:
        """Pauses before attempts 2, 3, ... in seconds, without jitter."""
        return [self.delay(failures) for failures in range(1, self.attempts)]


class StorageConfig(Config):
    """Which checkpoints a run keeps, and a copy of its run directory elsewhere."""

    keep_last: int | None = Field(
        3,
        ge=1,
        description="Keep so many of the newest checkpoints; older ones are deleted once a newer one is verified (embedded backend; fireworks has no call for it). None = keep all.",
    )
    keep_every: int | None = Field(
        None, ge=1, description="Keep also every checkpoint whose step is a multiple of this. None = none besides."
    )
    mirror_url: Annotated[str | None, AfterValidator(refuse_credentials)] = Field(
        None,
        min_length=1,
        description="Folder as an fsspec URL (s3://bucket/runs/a, gs://..., file:///...) that the run directory is copied to after each commit. Credentials come from the environment. None = no copy.",
    )


class AdamConfig(Config):
    """AdamW, with decoupled weight decay on all trained parameters (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay. 0 = off.")
    grad_clip_norm: float = Field(0.0, ge=0, description="Global norm to which gradients are clipped. 0 = off.")


class EvalConfig(Config):
    """Held-out evaluation: loss, token accuracy and exact match, before and after training and every `interval` steps."""

    dataset: str | None = Field(None, description="JSONL file with held-out rows. None = no evaluation.")
    interval: int = Field(
        0, ge=0, description="Also evaluate every N optimizer steps. 0 = only before and after training."
    )
    max_examples: int | None = Field(None, ge=1, description="Use only the first N rows. None = all.")
    timeout_s: int = Field(1800, gt=0, description="Seconds for one evaluation.")


TRAIN_ON_WHAT = ("all_assistant_messages", "last_assistant_message", "all_messages")
LR_SCHEDULES = ("constant", "linear", "cosine")
GRAD_ACCUMULATION_NORMALIZATIONS = ("num_loss_tokens", "num_sequences", "none")
BACKENDS = ("embedded", "fireworks")

FORM_FIRST = ("learning_rate", "epochs", "lora_rank", "max_seq_len", "output_model_id")
"""Shared fields that a form shows among the recipe's own."""


def _form_order(schema: dict[str, Any], cls: type[RecipeConfig]) -> None:
    """Number the fields as a Prefect form shows them: what is required, the recipe's own, what all share, the blocks."""
    shared = set(RecipeConfig.model_fields)
    properties = schema["properties"]

    def rank(name: str) -> tuple[bool, bool, bool]:
        is_block = "$ref" in properties[name] or "allOf" in properties[name]
        return not cls.model_fields[name].is_required(), is_block, name in shared and name not in FORM_FIRST

    for position, name in enumerate(sorted(properties, key=rank)):
        properties[name]["position"] = position


class RecipeConfig(Config):
    """What all recipes share."""

    model_config = ConfigDict(json_schema_extra=_form_order)

    recipe: ClassVar[str]

    log_path: str = Field(
        min_length=1,
        description="Run directory: state, checkpoint records, metrics. Start again with the same one to resume.",
    )
    base_model: str = Field(
        min_length=1,
        description="Model to fine-tune: a name of `cookbook models list`, a local Hugging Face folder, or a model resource of the backend.",
    )
    dataset: str = Field(min_length=1, description="JSONL file with the training rows.")
    backend: Annotated[str, AfterValidator(_Choice(BACKENDS))] = _choice(
        "embedded",
        "Where to train: embedded = a server on this machine; fireworks = the Fireworks training API (key from FIREWORKS_API_KEY or the Secret block fireworks-api-key).",
        *BACKENDS,
    )
    tokenizer_model: str | None = Field(None, description="Model name or folder of the tokenizer. None = base_model.")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="Peak learning rate.")
    epochs: int = Field(1, ge=1, description="Passes over the data.")
    max_seq_len: int | None = Field(
        None,
        ge=2,
        description="Longest row in tokens; longer ones are dropped and named. None = the context length of the shape or model.",
    )
    lora_rank: int = Field(0, ge=0, le=1024, description="Rank of the LoRA adapter. 0 = full-parameter training.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of shuffling and adapter initialization.")
    init_from_checkpoint: str | None = Field(
        None,
        description='Start from the weights of this checkpoint, "name" or "job_id:name", with a fresh optimizer and step 0. Used only while log_path has no checkpoint of its own.',
    )
    output_model_id: str | None = Field(
        None,
        description="Promote the final checkpoint to a model with this id ([a-z0-9-], at most 63). {run_id} in it becomes the run's id, so that each run gets a model of its own. None = do not promote.",
    )
    save_final_checkpoint: bool = Field(True, description="Save weights, optimizer and a sampler snapshot at the end.")
    save_on_sigterm: bool = Field(
        True,
        description="Save before ending when the run is told to stop (SIGTERM: preemption, a cancelled run), also where dcp_save_interval is 0.",
    )
    sigterm_grace_s: float = Field(
        20,
        gt=0,
        description="Seconds from SIGTERM until that save must be done; then the last commit stands. Prefect kills a cancelled run after 30 s.",
    )
    grad_accumulation_normalization: Annotated[
        str | None, AfterValidator(_Choice(GRAD_ACCUMULATION_NORMALIZATIONS))
    ] = _choice(
        None,
        "What the trainer divides the accumulated gradient by. None = the loss is already normalized by the client.",
        *GRAD_ACCUMULATION_NORMALIZATIONS,
    )
    step_timeout: int = Field(0, ge=0, description="Seconds for one training step. 0 = 3600.")
    promote_timeout_s: int = Field(1800, gt=0, description="Seconds for promoting the final checkpoint.")
    infra: InfraConfig = Field(default_factory=InfraConfig, description="Trainer hardware.")
    weight_sync: WeightSyncConfig = Field(
        default_factory=WeightSyncConfig, description="Intervals of weight syncs and DCP saves."
    )
    adam: AdamConfig = Field(default_factory=AdamConfig, description="Optimizer.")
    retry: RetryConfig = Field(default_factory=RetryConfig, description="Retries of idempotent work.")
    storage: StorageConfig = Field(
        default_factory=StorageConfig, description="Which checkpoints are kept, and a copy of the run directory."
    )
    wandb: WandBConfig = Field(default_factory=WandBConfig, description="Weights & Biases.")
    runner: RunnerConfig = Field(default_factory=RunnerConfig, description="Files for an outer orchestrator.")

    @property
    def step_timeout_s(self) -> float:
        """Deadline of one training step in seconds."""
        return float(self.step_timeout or 3600)

    def model_id(self, run_id: str) -> str:
        """`output_model_id` of the run with this id; "" where nothing is promoted."""
        return (self.output_model_id or "").replace("{run_id}", run_id)

    def rule_problems(self) -> list[Problem]:
        """Rules over several fields or over the shape of a value. Bounds and types are the fields' own."""
        problems: list[Problem] = []
        if self.output_model_id is not None and not OUTPUT_MODEL_ID.fullmatch(self.model_id("run-00000000")):
            problems.append(
                Problem(
                    "output_model_id",
                    f"{self.output_model_id!r} is not a model id.",
                    "Use 1 to 63 of a-z, 0-9 and '-', not at the ends.",
                )
            )
        if self.output_model_id is not None and not self.save_final_checkpoint:
            problems.append(
                Problem(
                    "output_model_id",
                    f"{self.output_model_id!r} needs a final checkpoint, but save_final_checkpoint is false.",
                    "Set it to true, or remove output_model_id.",
                )
            )
        if self.init_from_checkpoint is not None and not CHECKPOINT_REFERENCE.fullmatch(self.init_from_checkpoint):
            problems.append(
                Problem(
                    "init_from_checkpoint",
                    f"{self.init_from_checkpoint!r} is not a checkpoint.",
                    'Write "name" or "job_id:name", in a-z, 0-9 and "-".',
                )
            )
        if self.backend == "fireworks" and self.infra.training_shape_id is None:
            missing = [n for n in ("accelerator_type", "accelerator_count") if getattr(self.infra, n) is None]
            if missing:
                names = " and ".join(f"infra.{n}" for n in missing)
                problems.append(
                    Problem(
                        "infra",
                        f"training_shape_id is None and {names} not set, with backend 'fireworks'.",
                        "Set infra.training_shape_id, or the accelerator's type and count for a manual launch.",
                    )
                )
        return problems

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = self.rule_problems()
        if problems:
            raise ConfigError(problems)
        return self


class ScheduledConfig(RecipeConfig):
    """A recipe with a learning-rate schedule and warm-up."""

    lr_schedule: Annotated[str, AfterValidator(_Choice(LR_SCHEDULES))] = _choice(
        "constant", "Learning rate after the warm-up, until the last step.", *LR_SCHEDULES
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of all steps over which the learning rate rises linearly from 0."
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Share of learning_rate at which linear and cosine schedules end."
    )

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

        Warm-up rises linearly over the first round(warmup_ratio * total_steps) steps, so that step 0 already moves; the
        schedule then runs towards min_lr_ratio * learning_rate, which it would reach after the last step: no step is idle.
        """
        warmup = round(self.warmup_ratio * total_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total_steps - warmup)
        remaining = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[
            self.lr_schedule
        ]
        return self.learning_rate * (
            self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining if self.lr_schedule != "constant" else 1.0
        )


class SFTConfig(ScheduledConfig):
    """Supervised fine-tuning on chat rows: `{"messages": [{"role", "content"}, ...]}`."""

    recipe: ClassVar[str] = "sft"

    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate.")
    epochs: int = Field(3, ge=1, description="Passes over the data.")
    batch_size: int = Field(32, ge=1, le=65536, description="Examples in one optimizer step.")
    max_examples: int | None = Field(None, ge=1, description="Use only the first N rows. None = all.")
    train_on_what: Annotated[str, AfterValidator(_Choice(TRAIN_ON_WHAT))] = _choice(
        "all_assistant_messages", "Which tokens are trained.", *TRAIN_ON_WHAT
    )
    renderer_name: str | None = Field(
        None, description="How messages become tokens. None = the tokenizer's own chat template."
    )
    evaluation: EvalConfig = Field(default_factory=EvalConfig, description="Held-out evaluation.")


POLICY_LOSSES = ("grpo", "importance_sampling", "dapo", "dro", "gspo", "reinforce", "cispo")
ADVANTAGES = ("group_std", "group_mean", "leave_one_out")
_RATIO_LOG_CAP = "Bound of the log ratio, on both sides, before it is exponentiated."


class TISConfig(Config):
    """Truncated importance sampling: the weight w = min(exp(old - sampled), cap) for what sampler and trainer differ in."""

    cap: float = Field(5.0, gt=0, description="Largest weight. Smaller differences pass unchanged.")
    level: Annotated[str, AfterValidator(_Choice(("token", "sequence")))] = _choice(
        "token",
        "token = one weight a token; sequence = the geometric mean over the sampled tokens of a completion.",
        "token",
        "sequence",
    )


class DAPOConfig(Config):
    """DAPO (Yu et al. 2025, arXiv:2503.14476)."""

    eps_clip: float = Field(0.2, ge=0, lt=1, description="Ratios below 1 - eps_clip are clipped.")
    eps_clip_high: float = Field(0.28, ge=0, description="Ratios above 1 + eps_clip_high are clipped.")
    eps_clip_c: float | None = Field(None, gt=1, description="Dual clip for negative advantages. None = off.")
    ratio_log_cap: float = Field(20.0, gt=0, le=80, description=_RATIO_LOG_CAP)


class GSPOConfig(Config):
    """GSPO (Zheng et al. 2025, arXiv:2507.18071)."""

    clip_ratio_low: float = Field(
        0.2, ge=0, lt=1, description="Sequence ratios below 1 - this are clipped. The paper uses 3e-4."
    )
    clip_ratio_high: float = Field(
        0.2, ge=0, description="Sequence ratios above 1 + this are clipped. The paper uses 4e-4."
    )
    seq_ratio_log_cap: float = Field(10.0, gt=0, le=80, description="Upper bound of the sequence's log ratio.")


class CISPOConfig(Config):
    """CISPO (MiniMax-M1 2025, arXiv:2506.13585)."""

    eps_low: float = Field(0.2, ge=0, le=1, description="Ratios are raised to at least 1 - eps_low.")
    eps_high: float = Field(0.28, ge=0, description="Ratios are lowered to at most 1 + eps_high.")
    ratio_log_cap: float = Field(20.0, gt=0, le=80, description=_RATIO_LOG_CAP)


class DROConfig(Config):
    """DRO (Richemond et al. 2024, arXiv:2405.19107)."""

    beta: float = Field(0.05, ge=0, description="Weight of the squared log ratio.")


class RLEvalConfig(Config):
    """Held-out evaluation: the mean reward of greedy answers, before and after training and every `interval` steps."""

    dataset: str | None = Field(
        None, description="JSONL file with held-out rows, or reasoning_gym:NAME?option=value. None = no evaluation."
    )
    interval: int = Field(
        0, ge=0, description="Also evaluate every N optimizer steps. 0 = only before and after training."
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first N rows. None = all.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Longest answer in tokens. None = max_completion_tokens of the run."
    )
    num_samples: int = Field(5, ge=0, description="Answers that the report shows side by side, before and after.")
    timeout_s: int = Field(1800, gt=0, description="Seconds for one evaluation.")


class RLConfig(RecipeConfig):
    """Reinforcement learning on prompts with a reward: `{"messages": [...], "ground_truth": ...}`."""

    recipe: ClassVar[str] = "rl"

    dataset: str = Field(
        min_length=1,
        description="JSONL file with the rows, or a procedural task, reasoning_gym:NAME?option=value.",
    )
    reward: str = Field(
        min_length=1,
        description="What a completion is worth: a ready reward (exact, numeric, math, countdown, format:REGEX, reasoning_gym:NAME?option=value) or your own as module:function.",
    )
    reward_timeout_s: float = Field(30.0, gt=0, description="Seconds for the reward of one completion.")
    prompt_groups_per_step: int = Field(1, ge=1, le=4096, description="Accepted prompt groups in one optimizer step.")
    completions_per_prompt: int = Field(4, ge=1, le=1024, description="Completions in a prompt group.")
    max_rows: int | None = Field(100, ge=1, description="Use only the first N rows. None = all.")
    max_completion_tokens: int = Field(1024, ge=1, description="Longest completion in tokens, over all its turns.")
    temperature: float = Field(1.0, gt=0, le=10, description="Sampling temperature.")
    stop: list[str] | None = Field(None, description="Texts that end a completion, beside the model's own end.")
    policy_loss: Annotated[str, AfterValidator(_Choice(POLICY_LOSSES))] = _choice(
        "grpo", "Loss of the policy.", *POLICY_LOSSES
    )
    advantage: Annotated[str, AfterValidator(_Choice(ADVANTAGES))] = _choice(
        "group_std",
        "group_std = (R - mean) / std of the group; group_mean = R - mean (Dr.GRPO); leave_one_out = R - mean of the others (RLOO).",
        *ADVANTAGES,
    )
    kl_beta: float = Field(
        0.001,
        ge=0,
        description="Weight of the KL term to the reference: the base under the adapter (LoRA), or a trainer on infra.ref_training_shape_id. Without a reference there is none.",
    )
    kl_estimator: Annotated[str, AfterValidator(_Choice(("k3", "k2")))] = _choice(
        "k3", "Estimator of the KL term; k2 has the gradient of the reverse KL.", "k3", "k2"
    )
    eps_clip: float = Field(0.2, ge=0, lt=1, description="grpo: ratios below 1 - eps_clip are clipped.")
    eps_clip_high: float | None = Field(
        None, ge=0, description="grpo: ratios above 1 + eps_clip_high are clipped. None = eps_clip."
    )
    ratio_log_cap: float = Field(20.0, gt=0, le=80, description=_RATIO_LOG_CAP)
    anchor_logp: Annotated[str, AfterValidator(_Choice(("auto", "rollout", "old_policy")))] = _choice(
        "auto",
        "Where the ratio is 1: rollout = the sampler's logprobs; old_policy = a forward pass of the trainer; auto = rollout where one update follows one weight sync.",
        "auto",
        "rollout",
        "old_policy",
    )
    tis: TISConfig = Field(default_factory=TISConfig, description="Truncated importance sampling.")
    dapo: DAPOConfig = Field(default_factory=DAPOConfig, description="Of policy_loss dapo.")
    gspo: GSPOConfig = Field(default_factory=GSPOConfig, description="Of policy_loss gspo.")
    cispo: CISPOConfig = Field(default_factory=CISPOConfig, description="Of policy_loss cispo.")
    dro: DROConfig = Field(default_factory=DROConfig, description="Of policy_loss dro.")
    router_replay: bool = Field(
        False, description="Replay the routing of mixtures of experts. Not available: must stay false."
    )
    environment: str | None = Field(
        None,
        description="Multi-turn rollouts: an environment as module:function, or calculator. None = one turn.",
    )
    max_turns: int = Field(4, ge=1, le=1000, description="Most turns of a multi-turn rollout.")
    group_filter: str | None = Field(
        None,
        description="Which groups are trained, as module:function. None = those whose rewards are not all equal.",
    )
    trajectory_dir: str | None = Field(None, description="Folder for one JSONL file of rollouts a step. None = none.")
    policy_job_id: str | None = Field(
        None, description="Trainer job to adopt as the policy; it is never stopped or deleted. None = provision one."
    )
    policy_base_url: str | None = Field(None, description="URL of the adopted policy trainer. None = by its job id.")
    reference_job_id: str | None = Field(None, description="Trainer job to adopt as the reference.")
    reference_base_url: str | None = Field(
        None, description="URL of the adopted reference trainer. None = by its job id."
    )
    logprob_check_limit: float = Field(
        1.0,
        gt=0,
        description="The run stops when sampler and trainer differ by more than this many nats in 1% of the tokens.",
    )
    grad_accumulation_normalization: Annotated[
        str | None, AfterValidator(_Choice(GRAD_ACCUMULATION_NORMALIZATIONS))
    ] = _choice(
        "num_loss_tokens",
        "What the trainer divides the accumulated gradient by. None = nothing: the loss is a plain sum.",
        *GRAD_ACCUMULATION_NORMALIZATIONS,
    )
    concurrency: ConcurrencyConfig = Field(
        default_factory=ConcurrencyConfig, description="Sampling requests in flight."
    )
    deployment: DeployConfig = Field(default_factory=DeployConfig, description="Deployment that samples.")
    evaluation: RLEvalConfig = Field(default_factory=RLEvalConfig, description="Held-out evaluation.")

    @property
    def has_reference(self) -> bool:
        """Whether there is a model to take the KL term against."""
        return self.lora_rank > 0 or self.infra.ref_training_shape_id is not None or self.reference_job_id is not None

    @property
    def needs_reference_trainer(self) -> bool:
        """Whether the KL term is taken against a trainer of its own; the base under a LoRA adapter needs none."""
        is_named = self.reference_job_id is not None or self.infra.ref_training_shape_id is not None
        return self.kl_beta > 0 and is_named

    @property
    def active_kl_beta(self) -> float:
        """`kl_beta` where there is a reference, else 0."""
        return self.kl_beta if self.has_reference else 0.0

    @property
    def tokenizer(self) -> str:
        """Model name or folder of the tokenizer."""
        return self.deployment.tokenizer_model or self.tokenizer_model or self.base_model

    def rule_problems(self) -> list[Problem]:
        """As for all recipes, and: groups of two, a KL term with a reference, what is not available."""
        problems = super().rule_problems()

        def add(where: str, what: str, remedy: str) -> None:
            problems.append(Problem(where, what, remedy))

        if self.completions_per_prompt < 2:
            what = f"must be at least 2, got {self.completions_per_prompt}: a group of one has advantage 0."
            add("completions_per_prompt", what, "Set it to 2 or more.")
        if self.kl_beta > 0 and "kl_beta" in self.model_fields_set and not self.has_reference:
            what = (
                f"is {self.kl_beta}, but there is no reference: lora_rank is 0 and infra.ref_training_shape_id is None."
            )
            add("kl_beta", what, "Set infra.ref_training_shape_id, train a LoRA adapter, or set kl_beta to 0.")
        interval, syncs = self.evaluation.interval, self.weight_sync.weight_sync_interval
        if self.evaluation.dataset is not None and syncs == 0:
            what = "is set, but weight_sync.weight_sync_interval is 0: the deployment never gets the trained weights."
            add("evaluation.dataset", what, "Set weight_sync.weight_sync_interval, or remove it.")
        elif interval > 0 and interval % syncs != 0:
            what = f"is {interval}, which is not a multiple of weight_sync.weight_sync_interval={syncs}: between two weight syncs the deployment has older weights."
            add("evaluation.interval", what, "Use a multiple of it.")
        if self.router_replay:
            add("router_replay", "is true, but this is not available.", "Remove it.")
        for role in ("policy", "reference"):
            url, job = getattr(self, f"{role}_base_url"), getattr(self, f"{role}_job_id")
            if url is not None and job is None:
                add(f"{role}_base_url", f"is set, but {role}_job_id is None.", f"Set {role}_job_id too.")
        has_tokenizer = self.deployment.tokenizer_model is not None or self.tokenizer_model is not None
        if self.backend == "fireworks" and not has_tokenizer:
            what = "is None: rows are tokenized on this machine, and base_model is a resource of the backend."
            add("deployment.tokenizer_model", what, "Set it to a Hugging Face model name or folder.")
        return problems + _deployment_problems(self)


class PreferenceEvalConfig(Config):
    """Held-out evaluation: loss, and how often the chosen answer is preferred, before and after training and every `interval` steps."""

    dataset: str | None = Field(None, description="JSONL file with held-out pairs. None = no evaluation.")
    interval: int = Field(
        0, ge=0, description="Also evaluate every N optimizer steps. 0 = only before and after training."
    )
    max_pairs: int | None = Field(None, ge=1, description="Use only the first N pairs. None = all.")
    timeout_s: int = Field(1800, gt=0, description="Seconds for one evaluation.")


class PreferenceConfig(ScheduledConfig):
    """What the recipes on pairs of answers share: rows with a chosen and a rejected answer to one prompt."""

    batch_size: int = Field(4, ge=1, le=65536, description="Pairs in one optimizer step.")
    max_pairs: int | None = Field(None, ge=1, description="Use only the first N pairs. None = all.")
    renderer_name: str | None = Field(
        None, description="How messages become tokens. None = the tokenizer's own chat template."
    )
    evaluation: PreferenceEvalConfig = Field(default_factory=PreferenceEvalConfig, description="Held-out evaluation.")

    def rule_problems(self) -> list[Problem]:
        """As for all recipes, and: an interval of evaluations has something to evaluate on."""
        problems = super().rule_problems()
        if self.evaluation.interval > 0 and self.evaluation.dataset is None:
            what = f"is {self.evaluation.interval}, but evaluation.dataset is None."
            problems.append(Problem("evaluation.interval", what, "Set evaluation.dataset, or remove it."))
        return problems


class DPOWeightSyncConfig(WeightSyncConfig):
    """Intervals and deadlines of weight syncs and of distributed checkpoints (DCP). DPO syncs only when asked to."""

    weight_sync_interval: int = Field(
        0,
        ge=0,
        description="Save and sync sampler weights to a deployment every N optimizer steps. 0 = never, and no deployment is provisioned.",
    )


class DPOConfig(PreferenceConfig):
    """Direct preference optimization: `{"chosen": {"messages": [...]}, "rejected": {"messages": [...]}}`."""

    recipe: ClassVar[str] = "dpo"

    beta: float = Field(
        0.1, gt=0, description="How strongly the policy is held to the reference: weight of the log ratios."
    )
    ref_cache_concurrency: int = Field(
        16, ge=1, le=256, description="Requests for reference logprobs in flight, while training already runs."
    )
    ref_cache_batch_size: int = Field(
        1,
        ge=1,
        le=1024,
        description="Pairs in one request for reference logprobs. With 1 they depend on nothing but the pair, to the last bit.",
    )
    weight_sync: DPOWeightSyncConfig = Field(
        default_factory=DPOWeightSyncConfig, description="Intervals of weight syncs and DCP saves."
    )
    deployment: DeployConfig = Field(
        default_factory=DeployConfig,
        description="Deployment that gets the weights, where weight_sync_interval is not 0.",
    )

    @field_validator("weight_sync", mode="before")
    @classmethod
    def _only_what_was_set(cls, value: Any) -> Any:
        """A shared WeightSyncConfig keeps what was set in it; weight_sync_interval is 0 unless it was."""
        is_shared = isinstance(value, WeightSyncConfig) and not isinstance(value, DPOWeightSyncConfig)
        return value.model_dump(exclude_unset=True) if is_shared else value

    @property
    def needs_reference_trainer(self) -> bool:
        """Whether the reference is a trainer of its own; with LoRA it is the base under the adapter."""
        return self.lora_rank == 0

    @property
    def has_deployment(self) -> bool:
        """Whether the weights are synced to a deployment."""
        return self.weight_sync.weight_sync_interval > 0

    def rule_problems(self) -> list[Problem]:
        """As for all recipes, and: one reference, a deployment that can be had."""
        problems = super().rule_problems()
        if self.lora_rank > 0 and self.infra.ref_training_shape_id is not None:
            what = (
                f"is {self.infra.ref_training_shape_id!r}, but with lora_rank {self.lora_rank} the base under the "
                "adapter is the reference."
            )
            problems.append(Problem("infra.ref_training_shape_id", what, "Remove it."))
        if self.has_deployment:
            return problems + _deployment_problems(self)
        unused = ["deployment"] if self.deployment != DeployConfig() else []
        unused += ["weight_sync.weight_sync_before_training"] if self.weight_sync.weight_sync_before_training else []
        what = "is set, but weight_sync.weight_sync_interval is 0: there is no deployment."
        return problems + [Problem(name, what, "Set the interval, or remove it.") for name in unused]


class ORPOConfig(PreferenceConfig):
    """Odds-ratio preference optimization, without a reference: the rows of DPO."""

    recipe: ClassVar[str] = "orpo"

    orpo_lambda: float = Field(1.0, ge=0, description="Weight of the odds-ratio term beside the chosen answer's loss.")


DeployedConfig = RLConfig | DPOConfig
"""Recipes with a deployment that the weights are synced to."""


def _deployment_problems(config: RLConfig | DPOConfig) -> list[Problem]:
    """What a deployment on fireworks needs and has not got."""
    shape, accelerator = config.deployment.deployment_shape, config.deployment.deployment_accelerator_type
    if config.backend != "fireworks" or any(
        (shape, accelerator, config.deployment.deployment_id, config.infra.training_shape_id)
    ):
        return []
    what = "neither deployment_shape nor deployment_accelerator_type is set, with backend 'fireworks'."
    return [Problem("deployment", what, "Set deployment.deployment_shape.")]


RECIPE_CONFIGS: Mapping[str, type[RecipeConfig]] = {
    "sft": SFTConfig,
    "rl": RLConfig,
    "dpo": DPOConfig,
    "orpo": ORPOConfig,
}


@dataclass(frozen=True)
class Environment:
    """What the process environment says. Keys never show in a repr."""

    home: Path
    fireworks_base_url: str
    fireworks_api_key: str | None = field(default=None, repr=False)
    serve_api_key: str | None = field(default=None, repr=False)
    """What clients of `cookbook serve` must send."""
    runner_files: Mapping[str, str] = field(default_factory=dict)
    wandb_mode: str = "online"
    wandb_key_present: bool = False
    """Whether W&B finds a key of its own: in its variables or in the netrc file. The key itself is never read."""


def environment() -> Environment:
    """Read COOKBOOK_HOME, COOKBOOK_SERVE_API_KEY, the FIREWORKS_*, the COOKBOOK_*_FILE and the WANDB_* variables, now."""
    home = os.environ.get("COOKBOOK_HOME") or "~/.cookbook"
    names = {
        "status_file": "COOKBOOK_STATUS_FILE",
        "metadata_file": "COOKBOOK_METADATA_FILE",
        "metrics_file": "COOKBOOK_METRICS_FILE",
        "output_model_path": "COOKBOOK_OUTPUT_MODEL_PATH",
    }
    return Environment(
        home=Path(home).expanduser().resolve(),
        fireworks_base_url=os.environ.get("FIREWORKS_BASE_URL") or "https://api.fireworks.ai",
        fireworks_api_key=os.environ.get("FIREWORKS_API_KEY") or None,
        serve_api_key=os.environ.get("COOKBOOK_SERVE_API_KEY") or None,
        runner_files={key: os.environ[name] for key, name in names.items() if os.environ.get(name)},
        wandb_mode=os.environ.get("WANDB_MODE") or "online",
        wandb_key_present=_wandb_key_present(),
    )


def set_prefect_defaults() -> None:
    """Settings of Prefect for a run that is started on a command line, where the user has not chosen others.

    Call it before anything imports prefect. Our own log lines show, and go to the run's page; no telemetry, which also
    fights with a temporary server's start over its fresh database; and such a server gets time for that start, as its
    20 seconds are too few on a busy machine.
    """
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "cookbook,tasks")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")


def _wandb_key_present() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc  # pulls in much, and is needed only here

    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def bypass_proxies(host: str) -> None:
    """Keep this process's HTTP clients from sending requests for `host` to a proxy of the environment."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [entry for entry in os.environ.get(name, "").split(",") if entry]
        if host not in hosts:
            os.environ[name] = ",".join([*hosts, host])
