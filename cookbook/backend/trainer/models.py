"""The models of a worker: full-parameter, LoRA on a shared frozen base, and bare references; their life and weights.

Not thread-safe: everything here runs on the one compute thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cookbook.backend.decoder import HuggingFaceDecoder
from cookbook.backend.snapshots import Manifest, SnapshotKind
from cookbook.backend.trainer import export, lora
from cookbook.backend.trainer.job import JobSpec
from cookbook.backend.trainer.keeper import ForwardKeeper
from cookbook.backend.trainer.lora import LoraSettings
from cookbook.backend.trainer.optimizer import Optimizer
from cookbook.backend.trainer.state import TrainingState
from cookbook.backend.trainer.wire import Parsed, Sizes, parse_lora
from cookbook.errors import RequestRejected

__all__ = ["Accumulated", "Model", "ModelStore"]


@dataclass(frozen=True)
class Accumulated:
    """What forward_backward has gathered since the last step, beside the gradients themselves."""

    num_requests: int = 0
    num_loss_tokens: int = 0
    num_sequences: int = 0


class Model:
    """Weights and what belongs to them. `parameters` are the trainable ones; a reference has none, and no optimizer."""

    def __init__(
        self,
        model_id: str,
        decoder: HuggingFaceDecoder,
        parameters: Mapping[str, nn.Parameter],
        *,
        settings: LoraSettings | None = None,
        is_trained: bool,
    ) -> None:
        self.model_id = model_id
        self.decoder = decoder
        self.parameters = dict(parameters)
        self.lora = settings
        self.optimizer = Optimizer(parameters) if is_trained else None
        self.accumulated = Accumulated()
        self.keeper = ForwardKeeper()

    @property
    def lora_rank(self) -> int:
        return self.lora.rank if self.lora is not None else 0

    def take_gradients(self) -> dict[str, Tensor | None]:
        """Detach the gradients from the weights, so that what is computed next starts from none."""
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return gradients

    def put_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Put detached gradients back in place of the present ones."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]

    def add_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add detached gradients to the present ones."""
        for name, parameter in self.parameters.items():
            before = gradients[name]
            if before is not None and parameter.grad is not None:
                parameter.grad = before.add_(parameter.grad)
            elif before is not None:
                parameter.grad = before

    def drop_gradients(self) -> None:
        self.take_gradients()
        self.accumulated = Accumulated()

    def state(self) -> TrainingState:
        """Views of the weights and moments, without gradients."""
        return TrainingState(self.parameters, self.optimizer.moments() if self.optimizer is not None else {})

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


class ModelStore:
    """All models of one worker, and the base weights that they share."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self._models: dict[str, Model] = {}
        self._base: HuggingFaceDecoder | None = None

    def create(self, model_id: str, request: Parsed) -> Model:
        """Make the model of a create_model request. RequestRejected when this job is not one for it."""
        base_model = request.get("base_model")
        if base_model not in (self.spec.base_model, str(self.spec.model_dir)):
            raise RequestRejected(
                f"base_model is {base_model!r}, this trainer job was created with {self.spec.base_model!r}."
            )
        if request.get("projection_head_dim"):
            raise RequestRejected("projection_head_dim is not supported by this trainer. Leave it out.")
        config = request.get("lora_config")
        if request.get("base_only"):
            model = Model(model_id, self._shared_base(), {}, is_trained=False)
        elif not isinstance(config, dict):
            raise RequestRejected("lora_config is missing: send one with rank 0 for full-parameter training.")
        else:
            self._check_rank(config.get("rank"))
            model = self._full(model_id) if config["rank"] == 0 else self._adapter(model_id, parse_lora(config))
        self._models[model_id] = model
        return model

    def use(self, model_id: str) -> Model:
        """The model, its adapter switched on where it has one. RequestRejected when its creation failed."""
        model = self._models.get(model_id)
        if model is None:
            raise RequestRejected(f"model {model_id} was not created: see the error of its create_model.")
        if model.decoder is self._base:
            lora.activate(model.decoder, model_id if model.lora is not None else None)
        return model

    def remove(self, model_id: str) -> None:
        """Free a model's memory; the shared base stays. Unknown ids are no error: the model was never finished."""
        model = self._models.pop(model_id, None)
        if model is not None and model.lora is not None:
            lora.detach(model.decoder, model_id)

    def sizes(self, model: Model) -> Sizes:
        return Sizes(model.decoder.vocab_size, min(self.spec.max_context_length, model.decoder.max_positions))

    def manifest(self, model: Model, kind: SnapshotKind, name: str, checkpoint_type: str | None) -> Manifest:
        """Of a snapshot of this model as it is now, without its files."""
        steps = model.optimizer.steps if model.optimizer is not None else 0
        metadata: dict[str, str | int | float] = {
            "optimizer_steps": steps,
            "compute_dtype": model.decoder.compute_dtype,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }
        if model.lora is not None:
            metadata["lora_alpha"] = model.lora.alpha
        return Manifest(
            kind=kind,
            name=name,
            job_id=self.spec.job_id,
            base_model=self.spec.base_model,
            lora_rank=model.lora_rank,
            checkpoint_type=checkpoint_type,
            promotable=kind == "sampler" and checkpoint_type != "delta",
            created=time.time(),
            step=steps,
            metadata=metadata,
        )

    def write_sampler(self, folder: Path, model: Model, *, merged: bool) -> None:
        """Serving weights: a PEFT folder for a LoRA model, else (or `merged`) a Hugging Face folder in bfloat16."""
        base_folder = self.spec.model_dir
        if model.lora is None:
            export.write_model(folder, model.decoder, model.parameters.items(), base_folder)
        elif merged:
            export.write_model(folder, model.decoder, lora.merged_weights(model.decoder, model.model_id), base_folder)
        else:
            lora.write_adapter(folder, model.decoder, model.model_id, model.parameters, base_folder)

    def _check_rank(self, rank: object) -> None:
        if not isinstance(rank, int) or rank < 0:
            raise RequestRejected(f"lora rank must be a whole number of at least 0, got {rank!r}.")
        if rank != self.spec.lora_rank and not self.spec.forward_only:
            raise RequestRejected(
                f"lora rank is {rank}, this trainer job was created with lora_rank {self.spec.lora_rank}. "
                "Use the job's rank, or create another job."
            )

    def _shared_base(self) -> HuggingFaceDecoder:
        if self._base is None:
            self._base = HuggingFaceDecoder.load(self.spec.model_dir, self.spec.compute_dtype)
            self._base.compress()
        return self._base

    def _full(self, model_id: str) -> Model:
        decoder = HuggingFaceDecoder.load(self.spec.model_dir, self.spec.compute_dtype)
        is_trained = not self.spec.forward_only
        decoder.model.requires_grad_(is_trained)
        return Model(model_id, decoder, dict(decoder.model.named_parameters()), is_trained=is_trained)

    def _adapter(self, model_id: str, settings: LoraSettings) -> Model:
        base = self._shared_base()
        parameters = lora.attach(base, model_id, settings)
        return Model(model_id, base, parameters, settings=settings, is_trained=not self.spec.forward_only)
