"""The peer of part `grpo`: TRL's GRPOTrainer on given prompts. Runs in its own environment, prints one JSON line.

Full-parameter AdamW without a KL term, transformers' generation, gradient checkpointing off (it would only slow the
peer). Of 64 completions 16 are trained at a time: all at once need 15 GB in float32.
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
from trl import GRPOConfig, GRPOTrainer

ROWS_A_PASS = 16


class StepTimer(TrainerCallback):
    """Wall seconds of each optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


class Reward:
    """Share of different characters, as our side has it; notes what it was asked for."""

    __name__ = "distinct_characters"

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.tokens: list[int] = []

    def __call__(self, completions: list[Any], completion_ids: list[list[int]], **_: object) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        rewards = [len(set(text)) / max(1, len(text)) for text in texts]
        self.rewards.append(sum(rewards) / len(rewards))
        self.tokens.append(sum(len(ids) for ids in completion_ids))
        return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="JSONL file of prompts, {'messages': [...]}, all of one step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--completions", type=int, required=True, help="completions a prompt")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    with open(options.rows) as file:
        prompts = [json.loads(line)["messages"] for line in file]
    timer, reward = StepTimer(), Reward()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=ROWS_A_PASS,
                gradient_accumulation_steps=len(prompts) * options.completions // ROWS_A_PASS,
                num_generations=options.completions,
                max_completion_length=options.max_tokens,
                temperature=1.0,
                beta=0.0,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                gradient_checkpointing=False,
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
    print(json.dumps({"seconds": timer.seconds, "tokens": reward.tokens, "rewards": reward.rewards}))


if __name__ == "__main__":
    main()
