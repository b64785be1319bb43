"""The real SmolLM2-135M-Instruct, where it has been pulled: is the converted model the published one?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cookbook.config import environment
from cookbook.models import load_tokenizer

NAME = "smollm2-135m-instruct"
MODELS_DIR = environment().home / "models"

pytestmark = pytest.mark.skipif(
    not (MODELS_DIR / NAME).is_dir(), reason=f"needs the real model: run `cookbook models pull {NAME}`"
)

ENGLISH = (
    "The history of the city begins in the Middle Ages, when it was a small fishing village on the coast. In the "
    "nineteenth century, the arrival of the railway turned it into one of the most important ports in the country."
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_chat_template_is_smollm2_s() -> None:
    tokenizer = load_tokenizer(NAME, MODELS_DIR)
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_is_cut_as_smollm2_was_trained_and_comes_back_whole() -> None:
    tokenizer = load_tokenizer(NAME, MODELS_DIR)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12345 + 67<|im_end|>")) == [
        *"12345",
        "\u0120+",
        "\u0120",
        *"67",
        "<|im_end|>",
    ]
    for text in (ENGLISH, "na\u00efve caf\u00e9 \u2013 \u6771\u4eac \U0001f642\n\n\ttab  double", "I'll don't  "):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_the_model_knows_english_and_answers_a_question() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder: Path = MODELS_DIR / NAME
    tokenizer = load_tokenizer(NAME, MODELS_DIR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    english = tokenizer(ENGLISH, return_tensors="pt").input_ids
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        perplexity = math.exp(model(english, labels=english).loss)
        answer = model.generate(tokens, max_new_tokens=16, do_sample=False)
    assert 6 < perplexity < 12
    assert tokenizer.decode(answer[0, tokens.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
