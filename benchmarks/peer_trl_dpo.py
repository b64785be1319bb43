"""The peer of part `dpo`: TRL's DPOTrainer on given pairs of token rows. In its own environment, prints one JSON line.

Full-parameter AdamW on a fixed batch, repeated each step, reference logprobs computed once before the first step,
gradient checkpointing off (it would only slow the peer).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class StepTimer(TrainerCallback):
    """Wall seconds and loss of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, _args: object, _state: object, _control: object, logs: dict[str, float], **__: object) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class TokenDPOTrainer(DPOTrainer):
    """A DPOTrainer whose rows are token ids already; times its pass over the reference."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments)
        self.reference_seconds = time.perf_counter() - started
        return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSON file: list of {prompt, chosen, rejected} token ids")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    with open(options.rows) as file:
        rows = [{f"{name}_ids": ids for name, ids in pair.items()} for pair in json.load(file)]
    timer = StepTimer()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TokenDPOTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            train_dataset=Dataset.from_list(rows),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(rows),
                precompute_ref_log_probs=True,
                beta=options.beta,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=0.0,
                gradient_checkpointing=False,
                max_length=None,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            callbacks=[timer],
        )
        trainer.train()
    result = {"seconds": timer.seconds, "losses": timer.losses, "reference": [trainer.reference_seconds]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
