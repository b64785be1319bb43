"""The peer of part `sft`: TRL's SFTTrainer on given token rows. Runs in its own environment, prints one JSON line.

Full-parameter AdamW on a fixed batch, repeated each step, gradient checkpointing off (it would only slow the peer).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSON file: list of lists of token ids, all of one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    with open(options.rows) as file:
        rows = json.load(file)
    timer = StepTimer()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=len(rows),
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
    print(json.dumps({"seconds": timer.seconds, "losses": timer.losses, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
