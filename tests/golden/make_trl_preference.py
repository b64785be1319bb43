"""Writes trl_preference.json: losses and gradients of TRL's own DPO and ORPO code.

    python -m tests.golden.make_trl_preference     # from the repository's root

Run it in an environment with benchmarks/requirements.txt. Two parts: TRL's loss on given logprobs, through a stand-in
model that answers just those; and TRL's loss of the tiny model of the tests on given tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.tiny_model import make_tiny_model

FILE = Path(__file__).with_name("trl_preference.json")
BETAS = (0.05, 0.1, 1.0)
LENGTHS = (((3, 2), (2, 5)), ((4, 1), (1, 1), (1, 6)), ((2, 3), (6, 6), (9, 2), (5, 1)))
"""Of each case, of each pair: tokens of the chosen and of the rejected response."""
PROMPTS = (4, 1, 7, 3)
TOKENS = (
    ([10, 20, 30], [40, 50], [60]),
    ([5], [7], [9, 11, 13]),
    ([100, 101, 102, 103, 104], [1, 2, 3, 4], [1, 2, 5]),
)
"""Prompt, chosen and rejected response of the pairs for the tiny model."""
REFERENCES = ((-11.0, -7.5), (-4.0, -19.0), (-21.0, -18.5))


def logprobs(generator: torch.Generator, count: int) -> Tensor:
    """Float64 (count,), from near certain to improbable, rounded so that the file stays short."""
    drawn = -torch.exp(1.5 * torch.randn(count, generator=generator, dtype=torch.float64))
    return (drawn * 1e4).round().clamp(max=-1) / 1e4


def near(logprobs: Tensor, drift: Tensor) -> float:
    """A reference's sum that lies `drift` nats from the policy's."""
    return float((logprobs.detach().sum() + drift).clamp(max=-0.01).round(decimals=4))


def floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]


# -- DPO ---------------------------------------------------------------------------------------------------------------


class GivenLogprobs(nn.Module):
    """Answers as the model of DPOTrainer does, with given logprobs (2 B, T) of all targets."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.rows)
        return SimpleNamespace(log_probs=self.rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo_batch(prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]], references: Any) -> Any:
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": d, "ref_chosen_logps": r[0], "ref_rejected_logps": r[1]}
        for p, c, d, r in zip(prompts, chosen, rejected, references, strict=True)
    ]
    return DataCollatorForPreference(pad_token_id=0)(rows)


def dpo_case(trainer: DPOTrainer, beta: float, lengths: Any, generator: torch.Generator) -> dict[str, Any]:
    trainer.beta = beta
    chosen = [logprobs(generator, c).requires_grad_() for c, _ in lengths]
    rejected = [logprobs(generator, d).requires_grad_() for _, d in lengths]
    drift = 3 * torch.randn(len(lengths), 2, generator=generator, dtype=torch.float64)
    references = [(near(c, a), near(d, b)) for c, d, (a, b) in zip(chosen, rejected, drift, strict=True)]
    prompts = PROMPTS[: len(lengths)]
    batch = dpo_batch(
        [[1] * p for p in prompts], [[1] * len(c) for c in chosen], [[1] * len(d) for d in rejected], references
    )
    # TRL's collator makes them float32, on which its sigmoid would lose digits.
    batch["ref_chosen_logps"] = torch.tensor([r[0] for r in references], dtype=torch.float64)
    batch["ref_rejected_logps"] = torch.tensor([r[1] for r in references], dtype=torch.float64)
    width = batch["input_ids"].shape[1] - 1
    rows = [
        torch.cat([torch.zeros(p - 1).double(), side, torch.zeros(width - (p - 1) - len(side)).double()])
        for sides in (chosen, rejected)
        for p, side in zip(prompts, sides, strict=True)
    ]
    loss = trainer._compute_loss(GivenLogprobs(torch.stack(rows)), batch, return_outputs=False)
    loss.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("rewards/")}
    return {
        "beta": beta,
        "chosen": [floats(side) for side in chosen],
        "rejected": [floats(side) for side in rejected],
        "references": references,
        "loss": float(loss),
        "chosen_gradients": [floats(side.grad) for side in chosen],
        "rejected_gradients": [floats(side.grad) for side in rejected],
        "logged": logged,
    }


def dpo_of_model(trainer: DPOTrainer, model: nn.Module, beta: float) -> dict[str, Any]:
    trainer.beta = beta
    prompts, chosen, rejected = (list(side) for side in zip(*TOKENS, strict=True))
    model.zero_grad()
    loss = trainer._compute_loss(model, dpo_batch(prompts, chosen, rejected, REFERENCES), return_outputs=False)
    loss.backward()
    return {"beta": beta, "loss": float(loss), "grad_norm": grad_norm(model)}


# -- ORPO --------------------------------------------------------------------------------------------------------------


class LogitsOfLogprobs(nn.Module):
    """A vocabulary of two: every target is token 0 and has the given logprob, (2 B, T); the last position is unused."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        last = torch.full((len(rows), 1), -1.0, dtype=rows.dtype)
        self.rows = torch.cat([rows, last], dim=1)

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self.rows, torch.log(-torch.expm1(self.rows))], dim=-1))


def orpo_batch(prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]]) -> dict[str, Tensor]:
    batch = {}
    for name, responses in (("chosen", chosen), ("rejected", rejected)):
        rows = list(zip(prompts, responses, strict=True))
        batch[f"{name}_input_ids"] = padded([p + r for p, r in rows], 0)
        batch[f"{name}_labels"] = padded([[-100] * len(p) + r for p, r in rows], -100)
        batch[f"{name}_attention_mask"] = padded([[1] * len(p + r) for p, r in rows], 0)
    return batch


def padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def orpo_case(trainer: ORPOTrainer, beta: float, lengths: Any, generator: torch.Generator) -> dict[str, Any]:
    trainer.beta = beta
    prompts = PROMPTS[: len(lengths)]
    chosen = [logprobs(generator, c).requires_grad_() for c, _ in lengths]
    rejected = [logprobs(generator, d).requires_grad_() for _, d in lengths]
    before = [logprobs(generator, p - 1).requires_grad_() for p in prompts]
    batch = orpo_batch([[0] * p for p in prompts], [[0] * len(c) for c in chosen], [[0] * len(d) for d in rejected])
    width = max(p + max(pair) for p, pair in zip(prompts, lengths, strict=True)) - 1
    rows = [
        torch.cat([prompt, side, torch.full((width - len(prompt) - len(side),), -1.0).double()])
        for sides in (chosen, rejected)
        for prompt, side in zip(before, sides, strict=True)
    ]
    loss, logged = trainer.get_batch_loss_metrics(LogitsOfLogprobs(torch.stack(rows)), batch)
    loss.backward()
    return {
        "beta": beta,
        "chosen": [floats(side) for side in chosen],
        "rejected": [floats(side) for side in rejected],
        "prompts": [floats(side) for side in before],
        "loss": float(loss),
        "chosen_gradients": [floats(side.grad) for side in chosen],
        "rejected_gradients": [floats(side.grad) for side in rejected],
        "logged": {name: logged[name] for name in LOGGED},
    }


LOGGED = ("nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected", "rewards/accuracies")


def orpo_of_model(trainer: ORPOTrainer, model: nn.Module, beta: float) -> dict[str, Any]:
    trainer.beta = beta
    with torch.no_grad():
        loss, logged = trainer.get_batch_loss_metrics(
            model, orpo_batch(*(list(side) for side in zip(*TOKENS, strict=True)))
        )
    return {"beta": beta, "loss": float(loss), "logged": {name: logged[name] for name in LOGGED}}


# -- both --------------------------------------------------------------------------------------------------------------


def grad_norm(model: nn.Module) -> float:
    return float(
        torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_folder = make_tiny_model(Path(folder) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.pad_token = tokenizer.eos_token
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        common: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "report_to": [], "bf16": False}
        common["gradient_checkpointing"] = False

        def model() -> nn.Module:
            return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

        dpo = DPOTrainer(model=model(), args=DPOConfig(**common), train_dataset=rows, processing_class=tokenizer)
        dpo.precompute_ref_logps = True  # the reference's logprobs are in the batch
        dpo.model.train()
        orpo = ORPOTrainer(model=model(), args=ORPOConfig(**common), train_dataset=rows, processing_class=tokenizer)
        generator = torch.Generator().manual_seed(0)
        golden = {
            "trl": trl.__version__,
            "dpo": [dpo_case(dpo, *case, generator) for case in zip(BETAS, LENGTHS, strict=True)],
            "orpo": [orpo_case(orpo, *case, generator) for case in zip(BETAS, LENGTHS, strict=True)],
            "tokens": TOKENS,
            "references": REFERENCES,
            "dpo_of_model": dpo_of_model(dpo, dpo.model, 0.1),
            "orpo_of_model": orpo_of_model(orpo, orpo.model, 0.1),
        }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
