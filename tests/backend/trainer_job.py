"""A trainer's operations without its process: the same code that a worker's compute thread runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import orjson
import torch

from cookbook.backend.trainer.engine import Deferred, Operation
from cookbook.backend.trainer.job import read_spec
from cookbook.backend.trainer.models import ModelStore
from cookbook.backend.trainer.operations import Operations
from cookbook.backend.trainer.saves import StateSaves
from tests.wire.trainer_process import BASE_MODEL, write_spec

ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 0.0}


class TrainerJob:
    """Runs operations of one job one by one; each returns its result or raises."""

    def __init__(self, home: Path, model_dir: Path, job_id: str = "job-a", **spec: Any) -> None:
        write_spec(home / job_id, model_dir, **spec)
        self.store = ModelStore(read_spec(home / job_id))
        self.checkpoints = home / "checkpoints" / job_id
        self.saves = StateSaves()
        self.operations = Operations(self.store, saves=self.saves)
        self._numbers = itertools.count()

    def run(self, kind: str, model_id: str, **body: Any) -> dict[str, Any]:
        result = self.operations.execute(Operation(kind, model_id, orjson.dumps(body)))
        return result.finish() if isinstance(result, Deferred) else result

    def create(self, rank: int = 0, **lora: Any) -> str:
        model_id = f"model-{next(self._numbers)}"
        self.run("create_model", model_id, base_model=BASE_MODEL, lora_config={"rank": rank, **lora})
        return model_id

    def create_reference(self) -> str:
        model_id = f"reference-{next(self._numbers)}"
        self.run("create_model", model_id, base_model=BASE_MODEL, base_only=True)
        return model_id

    def forward(self, model_id: str, data: list[dict[str, Any]], loss_fn: str = "cross_entropy", **config: Any) -> Any:
        given = {"data": data, "loss_fn": loss_fn, "loss_fn_config": config}
        return self.run("forward", model_id, forward_input=given)

    def forward_backward(
        self, model_id: str, data: list[dict[str, Any]], loss_fn: str = "cross_entropy", **config: Any
    ) -> Any:
        given = {"data": data, "loss_fn": loss_fn, "loss_fn_config": config}
        return self.run("forward_backward", model_id, forward_backward_input=given)

    def step(self, model_id: str, normalization: str | None = None, **adam: float) -> dict[str, float]:
        body = {"adam_params": ADAM | adam, "grad_accumulation_normalization": normalization}
        return self.run("optim_step", model_id, **body)["metrics"]

    def train(self, model_id: str, data: list[dict[str, Any]], steps: int) -> None:
        for _ in range(steps):
            self.forward_backward(model_id, data)
            self.step(model_id, "num_loss_tokens")

    def weights(self, model_id: str) -> dict[str, torch.Tensor]:
        parameters = self.store.use(model_id).parameters
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def gradients(self, model_id: str) -> dict[str, torch.Tensor | None]:
        parameters = self.store.use(model_id).parameters
        return {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def datum(text: str, weights: list[float] | None = None, **inputs: list[float]) -> dict[str, Any]:
    """A datum of the text's bytes with per-token loss inputs, all 1-D."""
    tokens = list(text.encode())
    size = len(tokens) - 1
    if weights is None and not inputs:
        weights = [1.0] * size
    tensors = inputs if weights is None else {"weights": weights, **inputs}
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [size]},
            **{name: {"data": values, "dtype": "float32", "shape": [size]} for name, values in tensors.items()},
        },
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
