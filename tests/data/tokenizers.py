"""Tokenizers for the rendering tests: the tiny model's one under chat templates of the kinds in use."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
DROPS_REASONING = (  # as Qwen3: reasoning is shown in the last answer only, an empty one where there is none
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}"
    "{% if m['role'] == 'assistant' and loop.last %}{% set text = '<think>' + "
    "(m['content'].split('</think>')[0].replace('<think>', '') if '</think>' in m['content'] else '') "
    "+ '</think>' + text %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS_IN_PROMPT = (  # as DeepSeek R1: the generation prompt opens the reasoning, earlier answers are shown without
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END_OF_TURN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
SHOWS_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTS_MESSAGES = "{{ messages | length }}" + CHATML
"""Cannot be followed: the text before a message changes with the messages after it."""

FOLLOWABLE = {
    "chatml": CHATML,
    "default_system": DEFAULT_SYSTEM,
    "llama_3": LLAMA_3,
    "mistral": MISTRAL,
    "drops_reasoning": DROPS_REASONING,
    "thinks_in_prompt": THINKS_IN_PROMPT,
    "no_end_of_turn": NO_END_OF_TURN,
    "shows_tools": SHOWS_TOOLS,
}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def newline_merging_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Byte-level, but two newlines are one token, as in most real vocabularies."""
    from tokenizers import models

    from tests.tiny_model import _byte_characters

    characters = _byte_characters()
    newline = characters[ord("\n")]
    vocab = {character: byte for byte, character in characters.items()} | {newline * 2: 256}
    return _fast(models.BPE(vocab=vocab, merges=[(newline, newline)]), template, metaspace=False)


def metaspace_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """In the manner of SentencePiece: a space is U+2581, and each text that is tokenized gets one in front."""
    from tokenizers import models

    characters = ["\u2581", *map(chr, range(33, 127)), "\n"]
    vocab = {character: index for index, character in enumerate(characters)}
    return _fast(models.BPE(vocab=vocab, merges=[]), template, metaspace=True)


def _fast(model: object, template: str, *, metaspace: bool) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=special[2:]
    )
    fast.chat_template = template
    return fast
