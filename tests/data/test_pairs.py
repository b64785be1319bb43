"""Rows of two answers: the three forms, the boundary between prompt and answer on tokens, and what is refused."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cookbook.data import RenderedPair, RenderedRow, Renderer, render_pair
from cookbook.errors import DataError
from tests.data import tokenizers
from tests.data.conftest import chat
from tests.data.test_rendering import END, trained_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pair(prompt: list[str], chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    """A row of messages of user and assistant in turn."""
    return {"chosen": chat(*prompt, *chosen), "rejected": chat(*prompt, *rejected)}


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def sides(rendered: RenderedPair) -> list[RenderedRow]:
    return [rendered.chosen, rendered.rejected]


def trained(rendered: RenderedPair, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    return [trained_texts(side, tokenizer) for side in sides(rendered)]


def problem(renderer: Renderer, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        render_pair(row, renderer, "row 3 (d.jsonl, line 4)")
    assert str(caught.value).startswith("row 3 (d.jsonl, line 4)")
    return str(caught.value)


# Prompt and answers ------------------------------------------------------------------------------------------------


def test_a_one_letter_answer_is_trained_from_the_target_at_p_minus_one_on(renderer: Renderer) -> None:
    rendered = render_pair(pair(["q"], ["a"], ["b"]), renderer, "row 0")
    prompt = renderer.prompt_tokens(chat("q")["messages"], "row 0").tolist()
    assert rendered.prompt_tokens == len(prompt)
    for side, letter in zip(sides(rendered), "ab", strict=True):
        assert side.tokens[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(side.target_weights).tolist() == [len(prompt) - 1, len(prompt)]
        assert side.targets[len(prompt) - 1] == ord(letter)
    assert (rendered.num_trained, rendered.num_tokens) == (4, 2 * len(prompt) + 6)


def test_an_opening_that_both_answers_share_is_part_of_each(
    renderer: Renderer, tokenizer: PreTrainedTokenizerBase
) -> None:
    rendered = render_pair(pair(["q"], ["It is 4"], ["It is 5"]), renderer, "row 0")
    assert trained(rendered, tokenizer) == [[f"It is 4{END}"], [f"It is 5{END}"]]
    assert rendered.prompt_tokens == len(renderer.prompt_tokens(chat("q")["messages"], "row 0"))


def test_turns_that_both_sides_share_are_prompt_and_later_user_turns_are_masked(
    renderer: Renderer, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = pair(["q", "shared", "r"], ["a", "more", "b"], ["c"])
    rendered = render_pair(row, renderer, "row 0")
    assert trained(rendered, tokenizer) == [[f"a{END}", f"b{END}"], [f"c{END}"]]
    assert rendered.prompt_tokens == len(renderer.prompt_tokens(chat("q", "shared", "r")["messages"], "row 0"))


def test_a_message_s_own_weight_leaves_a_later_turn_of_an_answer_out(
    renderer: Renderer, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = pair(["q"], ["a", "more", "b"], ["c"])
    row["chosen"]["messages"][3]["weight"] = 0
    assert trained(render_pair(row, renderer, "row 0"), tokenizer) == [[f"a{END}"], [f"c{END}"]]


@pytest.mark.parametrize("name", sorted(tokenizers.FOLLOWABLE))
def test_the_boundary_is_the_same_on_both_sides_under_templates_of_all_kinds(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    renderer = Renderer(tokenizers.with_template(tokenizer, tokenizers.FOLLOWABLE[name]))
    rendered = render_pair(pair(["q"], ["Yes, 12"], ["Yes, no"]), renderer, "row 0")
    length = rendered.prompt_tokens
    assert rendered.chosen.tokens[:length].tolist() == rendered.rejected.tokens[:length].tolist()
    for side in sides(rendered):
        assert not side.weights[:length].any()
        assert side.weights[length] == 1
    assert all("Yes, " in texts[0] and len(texts) == 1 for texts in trained(rendered, renderer.tokenizer))


@pytest.mark.parametrize("make", [tokenizers.newline_merging_tokenizer, tokenizers.metaspace_tokenizer])
def test_an_answer_whose_first_characters_could_merge_with_the_header_keeps_the_boundary(make: Any) -> None:
    template = tokenizers.CHATML.replace("'\n' +", "'\n\n' +") if make is tokenizers.newline_merging_tokenizer else None
    renderer = Renderer(make(template or tokenizers.MISTRAL))
    first = "\n4" if template else "4"
    rendered = render_pair(pair(["q"], [first], ["5"]), renderer, "row 0")
    length = rendered.prompt_tokens
    assert rendered.chosen.tokens[:length].tolist() == rendered.rejected.tokens[:length].tolist()
    assert [side.weights[length] for side in sides(rendered)] == [1, 1]


def test_a_template_that_begins_the_answers_at_different_tokens_is_an_error(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    renderer = Renderer(tokenizers.with_template(tokenizer, tokenizers.THINKS_IN_PROMPT))
    both = render_pair(pair(["q"], ["<think>\na</think>4"], ["<think>\nb</think>5"]), renderer, "row 0")
    assert trained(both, renderer.tokenizer) == [[f"a</think>4{END}"], [f"b</think>5{END}"]]
    start = len(both.chosen.tokens[: both.prompt_tokens])  # the sampler's prompt ends after "<think>\n", 8 bytes
    text = problem(renderer, pair(["q"], ["<think>\na</think>4"], ["5"]))
    assert f"which begin at tokens {start} and {start - 8}: from token {start - 8} on they are '<think>" in text


def test_a_template_that_cannot_be_followed_is_an_error_that_names_the_side(tokenizer: PreTrainedTokenizerBase) -> None:
    shows_length = "{{ messages[-1]['content'] | length }}" + tokenizers.CHATML
    renderer = Renderer(tokenizers.with_template(tokenizer, shows_length))
    assert "rejected: the chat template renders" in problem(renderer, pair(["q"], ["a"], ["b" * 10]))


# Forms -------------------------------------------------------------------------------------------------------------


def test_the_same_pair_in_every_form_renders_the_same(renderer: Renderer) -> None:
    question, good, bad = said("user", "q"), said("assistant", "good"), said("assistant", "bad")
    chosen, rejected = {"messages": [question, good]}, {"messages": [question, bad]}
    forms: list[dict[str, Any]] = [
        {"chosen": chosen, "rejected": rejected, "id": 7},
        {"samples": [{**chosen, "score": 1.0}, {**rejected, "score": 0.0}]},
        {"samples": [{**rejected, "evals": {"score": 0}}, {**chosen, "evals": {"score": 1}}]},
        {"input": {"messages": [question]}, "preferred_output": [good], "non_preferred_output": [bad]},
        {"input": [question], "preferred_output": "good", "non_preferred_output": [bad]},
        {"input": "q", "preferred_output": "good", "non_preferred_output": "bad"},
    ]
    digests = {render_pair(form, renderer, "row 0").digest for form in forms}
    assert len(digests) == 1
    swapped = render_pair({"chosen": rejected, "rejected": chosen}, renderer, "row 0").digest
    assert swapped not in digests


def test_the_digest_tells_tokens_and_weights_apart(renderer: Renderer) -> None:
    row = pair(["q"], ["a", "more", "b"], ["c"])
    digest = render_pair(row, renderer, "row 0").digest
    assert re.fullmatch("[0-9a-f]{16}", digest)
    row["chosen"]["messages"][3]["weight"] = 0
    assert render_pair(row, renderer, "row 0").digest != digest


def test_tools_of_a_row_or_a_side_are_shown_in_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizers.with_template(tokenizer, tokenizers.SHOWS_TOOLS))
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = pair(["q"], ["a"], ["b"])
    everywhere = render_pair(row | {"tools": tools}, renderer, "row 0")
    assert "add" in renderer.tokenizer.decode(everywhere.chosen.tokens[: everywhere.prompt_tokens])
    each = {side: {**conversation, "tools": tools} for side, conversation in row.items()}
    assert render_pair(each, renderer, "row 0").digest == everywhere.digest
    output = {"input": {"messages": chat("q")["messages"], "tools": tools}}
    output |= {"preferred_output": "a", "non_preferred_output": "b"}
    assert render_pair(output, renderer, "row 0").digest == everywhere.digest
    assert "chosen and rejected have other tools" in problem(renderer, {**row, "chosen": each["chosen"]})


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{}, {"chosen": chat("q", "a")}, {"prompt": "q", "chosen": "a"}, {"messages": []}])
def test_an_unknown_form_lists_the_three(renderer: Renderer, row: dict[str, Any]) -> None:
    text = problem(renderer, row)
    assert f"(keys: {sorted(row)})" in text
    assert all(key in text for key in ('"chosen"', '"samples"', '"non_preferred_output"'))


def test_a_row_in_two_forms_is_refused(renderer: Renderer) -> None:
    row = pair(["q"], ["a"], ["b"])
    assert "in one form" in problem(renderer, row | {"samples": []})


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([1.0, 1.0], "[1.0, 1.0]"),
        ([1.0, 0.5], "[1.0, 0.5]"),
        ([1.0], "[1.0]"),
        ([1.0, 0.0, 0.0], "[1.0, 0.0, 0.0]"),
        ([True, False], "[True, False]"),
        ([1.0, None], "[1.0, None]"),
        (["1.0", 0.0], "[\"'1.0'\", 0.0]"),
    ],
)
def test_scores_other_than_one_and_zero_are_shown(renderer: Renderer, scores: list[Any], shown: str) -> None:
    samples = [{**chat("q", f"a{index}"), "score": score} for index, score in enumerate(scores)]
    assert f"samples with the scores {shown}. Keep two" in problem(renderer, {"samples": samples})


def test_equal_answers_and_missing_ones_are_told_apart(renderer: Renderer) -> None:
    assert "chosen and rejected are equal answers" in problem(renderer, pair(["q"], ["a"], ["a"]))
    assert "have no answer: both are the prompt alone" in problem(renderer, pair(["q"], [], []))
    assert "rejected has no answer of its own: chosen is the same and goes on" in problem(
        renderer, pair(["q"], ["a", "r", "b"], ["a"])
    )
    assert "chosen has no answer of its own" in problem(renderer, pair(["q"], [], ["a"]))


def test_answers_that_the_template_makes_equal_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizers.with_template(tokenizer, tokenizers.LLAMA_3))
    assert "equal answers once the chat template has rendered them" in problem(renderer, pair(["q"], ["a"], ["a "]))


def test_prompts_that_differ_are_named_by_message_and_shown_where_they_do(renderer: Renderer) -> None:
    row = {"chosen": chat("x" * 500 + "cat", "a"), "rejected": chat("x" * 500 + "dog", "b")}
    text = problem(renderer, row)
    assert "the prompts differ: messages[0] of chosen and rejected are user '...xxx" in text
    assert "xcat'" in text
    assert "xdog'" in text
    assert len(text) < 400
    answers = {"chosen": chat("q", "a"), "rejected": {"messages": [said("user", "q"), said("user", "r")]}}
    assert "messages[1] of chosen and rejected are assistant 'a' and user 'r'" in problem(renderer, answers)
    named = {"chosen": chat("q", "a"), "rejected": chat("q", "b")}
    named["chosen"]["messages"][0]["name"] = "Ann"
    assert "('name', 'Ann')" in problem(renderer, named)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": {}, "rejected": chat("q", "b")}, "chosen has no messages"),
        ({"chosen": [said("user", "q")], "rejected": chat("q", "b")}, "has chosen = [{'role': 'user'"),
        (pair(["q"], [""], ["b"]), "chosen, messages[1] is an empty answer"),
        (
            {"input": "q", "preferred_output": "a", "non_preferred_output": ""},
            "non_preferred_output, messages[0] is an",
        ),
        ({"input": "q", "preferred_output": [], "non_preferred_output": "b"}, "preferred_output has no messages"),
        ({"input": [], "preferred_output": "a", "non_preferred_output": "b"}, "input has no messages"),
        ({"input": 3, "preferred_output": "a", "non_preferred_output": "b"}, "input has no messages (messages = 3)"),
        ({"samples": "ab"}, "has samples = 'ab'"),
        (
            {"chosen": {"messages": [said("assistant", "a")]}, "rejected": {"messages": [said("assistant", "b")]}},
            "no p",
        ),
        (
            {"chosen": {"messages": [said("user", "q"), said("assistant", "a", weight=0)]}, "rejected": chat("q", "b")},
            "chosen, messages[1] begins the answer and has the weight 0",
        ),
    ],
)
def test_conversations_that_cannot_be_used_are_named_with_their_side(
    renderer: Renderer, row: dict[str, Any], message: str
) -> None:
    assert message in problem(renderer, row)


# Threads -----------------------------------------------------------------------------------------------------------


def test_two_renderers_of_one_tokenizer_never_use_it_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    shared = tokenizers.with_template(tokenizer, tokenizers.CHATML)
    inside, most, lock = 0, 0, threading.Lock()
    encode = shared.encode

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        result = encode(*arguments, **options)
        with lock:
            inside -= 1
        return result

    shared.encode = slow  # type: ignore[method-assign]
    renderers = [Renderer(shared), Renderer(shared)]
    row = pair(["q"], ["a"], ["b"])
    expected = render_pair(row, Renderer(tokenizer), "row 0").digest
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(render_pair, row, renderers[index % 2], "row 0") for index in range(8)]
        prompts = [pool.submit(renderers[index].prompt_tokens, chat("q")["messages"], "row 0") for index in range(2)]
        assert {job.result().digest for job in jobs} == {expected}
        assert len({job.result().tobytes() for job in prompts}) == 1
    assert most == 1
