"""Which tokens of a conversation are trained, under chat templates of all kinds."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cookbook.data import TRAIN_ON_WHAT, RenderedRow, Renderer
from cookbook.errors import DataError
from tests.data import tokenizers
from tests.data.conftest import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|im_end|>"


def trained_texts(rendered: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    groups = itertools.groupby(zip(rendered.tokens.tolist(), rendered.weights.tolist(), strict=True), lambda p: p[1])
    return [tokenizer.decode([token for token, _ in group]) for weight, group in groups if weight]


def train(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], train_on_what: str = "all_assistant_messages"
) -> list[str]:
    return trained_texts(Renderer(tokenizer, train_on_what).render(row, "row 0"), tokenizer)


def test_one_trained_token_after_a_prompt_of_p_tokens_is_the_target_at_p_minus_one() -> None:
    prompt_length = 5
    row = RenderedRow(np.arange(6, dtype=np.int32), np.array([0, 0, 0, 0, 0, 1], np.float32))
    assert np.flatnonzero(row.target_weights).tolist() == [prompt_length - 1]
    assert row.targets[prompt_length - 1] == 5
    assert len(row.model_input) == len(row.targets) == len(row.target_weights) == 5


def test_a_one_letter_answer_trains_the_letter_and_its_end_of_turn(renderer: Renderer) -> None:
    rendered = renderer.render(chat("q", "a"), "row 0")
    prompt = renderer.prompt_tokens(chat("q")["messages"], "row 0")
    assert rendered.tokens.tolist()[: len(prompt)] == prompt.tolist()
    assert np.flatnonzero(rendered.target_weights).tolist() == [len(prompt) - 1, len(prompt)]
    assert rendered.targets[len(prompt) - 1] == ord("a")
    assert rendered.num_trained == 2
    assert (rendered.tokens.dtype, rendered.weights.dtype) == (np.int32, np.float32)


def test_tokens_are_those_of_the_template_s_text(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("q", "a", "qq", "aa")
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert Renderer(tokenizer).render(row, "row 0").tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("train_on_what", "expected"),
    [
        ("all_assistant_messages", [f"one{END}", f"two{END}"]),
        ("last_assistant_message", [f"two{END}"]),
        ("all_messages", [f"rule{END}", f"first{END}", f"one{END}", f"second{END}", f"two{END}"]),
    ],
)
def test_train_on_what_chooses_the_messages(
    tokenizer: PreTrainedTokenizerBase, train_on_what: str, expected: list[str]
) -> None:
    row = chat("first", "one", "second", "two")
    row["messages"].insert(0, {"role": "system", "content": "rule"})
    assert train(tokenizer, row, train_on_what) == expected


def test_a_system_prompt_that_the_template_adds_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.DEFAULT_SYSTEM)
    assert train(changed, chat("hi", "yo"), "all_messages") == [f"hi{END}", f"yo{END}"]
    opened = {"messages": [{"role": "assistant", "content": "hello"}]}
    assert train(changed, opened) == [f"hello{END}"]


def test_a_later_user_message_is_rendered_but_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("q", "a", "thanks")
    assert train(tokenizer, row, "last_assistant_message") == [f"a{END}"]


def test_a_message_s_own_weight_overrides_train_on_what(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat("q", "bad", "again", "good")
    row["messages"][1]["weight"] = 0
    assert train(tokenizer, row) == [f"good{END}"]
    row["messages"][1]["weight"] = 1
    assert train(tokenizer, row, "last_assistant_message") == [f"bad{END}", f"good{END}"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("llama_3", [f"one{END}", f"two{END}"]),
        ("mistral", [" one </s>", " two</s>"]),
        ("drops_reasoning", [f"one {END}", f"<think></think>two{END}"]),
        ("thinks_in_prompt", [f"one {END}", f"two{END}"]),
        ("no_end_of_turn", ["one \n\n", "two\n\n"]),
    ],
)
def test_templates_of_other_kinds_are_followed(
    tokenizer: PreTrainedTokenizerBase, template: str, expected: list[str]
) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.FOLLOWABLE[template])
    assert train(changed, chat("first", "one ", "second", "two")) == expected


def test_reasoning_is_trained_where_the_template_shows_it(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.DROPS_REASONING)
    row = chat("q", "<think>hm</think>one", "q", "<think>so</think>two")
    assert train(changed, row) == [f"one{END}", f"<think>so</think>two{END}"]


def test_end_of_turn_is_found_for_each_template(tokenizer: PreTrainedTokenizerBase) -> None:
    found = {
        name: Renderer(tokenizers.with_template(tokenizer, template)).template.end_of_turn
        for name, template in tokenizers.FOLLOWABLE.items()
    }
    assert found == dict.fromkeys(tokenizers.FOLLOWABLE, END) | {"mistral": "</s>", "no_end_of_turn": None}


@pytest.mark.parametrize("template", sorted(tokenizers.FOLLOWABLE))
@pytest.mark.parametrize("train_on_what", TRAIN_ON_WHAT)
def test_random_conversations_train_exactly_their_messages(
    tokenizer: PreTrainedTokenizerBase, template: str, train_on_what: str
) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.FOLLOWABLE[template])
    renderer = Renderer(changed, train_on_what)
    generator = random.Random(f"{template} {train_on_what}")
    for _ in range(25):
        contents = ["".join(generator.choices("ab \n[:\u00e9", k=generator.randint(1, 6))) + "x" for _ in range(6)]
        row = chat(*contents[: generator.choice((2, 4, 6))])
        rendered = renderer.render(row, "row 0")
        text = changed.apply_chat_template(row["messages"], tokenize=False)
        assert changed.decode(rendered.tokens.tolist()) == text
        chosen = [
            message["content"].strip()
            for index, message in enumerate(row["messages"])
            if train_on_what == "all_messages"
            or (message["role"] == "assistant" and train_on_what == "all_assistant_messages")
            or index == len(row["messages"]) - 1
        ]
        assert rendered.weights[0] == 0
        joined = "".join(trained_texts(rendered, changed))
        ends = "".join(f"{content}|" for content in chosen)
        assert _letters(joined.replace("<think></think>", "")) == _letters(ends), joined


def _letters(text: str) -> str:
    """Content letters and ends of turns only; white space and instruction marks differ by template."""
    for mark in ("<|im_end|>", "</s>", "\n\n"):
        text = text.replace(mark, "")
    return "".join(c for c in text.replace("[/INST]", "") if c in "abx[:\u00e9")


def test_content_that_begins_with_a_newline_keeps_the_header_a_sampler_sees() -> None:
    tokenizer = tokenizers.newline_merging_tokenizer(tokenizers.CHATML)
    renderer = Renderer(tokenizer)
    prompt = renderer.prompt_tokens(chat("q")["messages"], "row 0").tolist()
    rendered = renderer.render(chat("q", "\na"), "row 0")
    assert rendered.tokens.tolist()[: len(prompt)] == prompt
    assert trained_texts(rendered, tokenizer) == [f"\na{END}"]
    text = tokenizer.apply_chat_template(chat("q", "\na")["messages"], tokenize=False)
    assert rendered.tokens.tolist() != tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_that_marks_the_start_of_text_is_tokenized_whole() -> None:
    tokenizer = tokenizers.metaspace_tokenizer(tokenizers.CHATML)
    rendered = Renderer(tokenizer).render(chat("q", "a b"), "row 0")
    text = tokenizer.apply_chat_template(chat("q", "a b")["messages"], tokenize=False)
    assert rendered.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
    trained = tokenizer.convert_ids_to_tokens(rendered.tokens[rendered.weights != 0].tolist())
    assert trained == ["a", "\u2581", "b", END]


def test_a_template_that_cannot_be_followed_names_the_message(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.COUNTS_MESSAGES)
    with pytest.raises(DataError, match=r"row 4: the chat template .* messages\[1\] \(assistant\)"):
        Renderer(changed).render(chat("q", "a", "q", "a"), "row 4")


def test_tools_and_tool_calls_are_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = tokenizers.with_template(tokenizer, tokenizers.SHOWS_TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert train(changed, row) == [f"<call>add</call>{END}", f"three{END}"]
    assert changed.decode(Renderer(changed).render(row, "row 0").tokens.tolist()).startswith("<|im_start|>tools\n[{")


def test_tools_that_the_template_leaves_out_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    row: dict[str, Any] = chat("q", "a")
    with pytest.raises(DataError, match="has tools, but the chat template does not show them"):
        Renderer(tokenizer).render(row | {"tools": [{"function": {"name": "add"}}]}, "row 0")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "add"}}]
    with pytest.raises(DataError, match=r"messages\[1\] has tool_calls, but the chat template does not show them"):
        Renderer(tokenizer).render(row, "row 0")


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, r"row 3 has no messages \(keys: \['prompt'\]\)"),
        ({"messages": []}, r"row 3 has no messages \(messages = \[\]\)"),
        ({"messages": "hi"}, "has no messages"),
        ({"messages": [USER]}, r"row 3 has no assistant message \(roles: \['user'\]\)"),
        ({"messages": [USER, "a"]}, r"row 3, messages\[1\] is 'a', not an object"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, r"messages\[1\] has role 'bot'. Use one of: system"),
        ({"messages": [USER, {"content": "a"}]}, r"messages\[1\] has role None"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, r"messages\[1\] has content 3. Write a string"),
        ({"messages": [USER, {"role": "assistant", "content": ["a"]}]}, r"has content \['a'\]"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "has content None"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "is an empty answer"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0.5}]}, "has weight 0.5"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "weight": True}]}, "has weight True"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}, r"no trained message .*\[None, 0\]"),
        ({"messages": [USER | {"tool_calls": []}]}, "Only an assistant message may have them"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}], "tools": "add"}, "has tools = 'add'"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a<|im_end|>b"}]},
            r"messages\[1\] contains '<\|im_end\|>'",
        ),
    ],
)
def test_an_invalid_row_is_named_with_its_fault(renderer: Renderer, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        renderer.render(row, "row 3")


def test_a_template_that_refuses_the_messages_is_a_data_error(tokenizer: PreTrainedTokenizerBase) -> None:
    changed = tokenizers.with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="row 9: the chat template refuses the messages: roles must alternate"):
        Renderer(changed).render(chat("q", "a"), "row 9")


def test_unknown_choices_are_errors_that_list_the_known(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"train_on_what 'everything' is unknown\. Use one of: all_assistant_messages"):
        Renderer(tokenizer, "everything")
    with pytest.raises(DataError, match="renderer_name 'qwen' is unknown"):
        Renderer(tokenizer, renderer_name="qwen")


def test_the_fingerprint_follows_what_decides_the_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    renderers = [
        Renderer(tokenizer),
        Renderer(tokenizer, "all_messages"),
        Renderer(tokenizers.with_template(tokenizer, tokenizers.LLAMA_3)),
    ]
    assert len({renderer.fingerprint for renderer in renderers}) == 3
    assert Renderer(tokenizer, renderer_name="chat_template").fingerprint == renderers[0].fingerprint


def test_the_first_token_is_never_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    rendered = Renderer(tokenizers.with_template(tokenizer, bare), "all_messages").render(chat("q", "a"), "row 0")
    assert rendered.weights.tolist() == [0, 1, 1, 1]
    assert rendered.num_trained == int(rendered.target_weights.sum()) == 3
