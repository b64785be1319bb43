"""Showing which tokens of a row are trained."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from cookbook.data import Renderer, preview, render_pair
from cookbook.data.preview import preview_pair
from tests.data.conftest import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_trained_text_is_bracketed_without_colour(tokenizer: PreTrainedTokenizerBase) -> None:
    text = preview(Renderer(tokenizer).render(chat("q", "a\nb", "r", "c"), "row 0"), tokenizer)
    assert text.plain == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a\\nb<|im_end|>]]\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[c<|im_end|>]]\n"
        "-- 6 of 48 tokens are trained (12%), shown in [[ ]]"
    )


def test_trained_text_is_coloured_and_markup_in_content_is_shown_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    text = preview(Renderer(tokenizer).render(chat("[red]q[/red]", "a"), "row 0"), tokenizer)
    terminal = io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="standard", width=200).print(text)
    assert "\x1b[1;4;32m[[a<|im_end|>]]\x1b[0m" in terminal.getvalue()
    assert "[red]q[/red]" in terminal.getvalue()


def test_a_pair_shows_its_prompt_once_and_both_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"chosen": chat("q", "a\nb", "r", "c"), "rejected": chat("q", "d")}
    text = preview_pair(render_pair(row, Renderer(tokenizer), "row 0"), tokenizer)
    assert text.plain == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        "-- chosen:\n[[a\\nb<|im_end|>]]\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[c<|im_end|>]]\n"
        "-- rejected:\n[[d<|im_end|>]]\n"
        "-- 6 tokens of chosen and 2 of rejected are trained, shown in [[ ]], after 20 tokens of prompt"
    )
