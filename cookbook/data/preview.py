"""A row as the trainer or the sampler will see it, for people to check before they train."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from cookbook.data.rendering import RenderedRow

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from cookbook.data.pairs import RenderedPair
    from cookbook.data.rl import RLRow

__all__ = ["preview", "preview_pair", "preview_prompt"]

TRAINED_STYLE = "bold green underline"
CONTEXT_STYLE = "dim"


def preview(rendered: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row's text, each stretch of trained tokens in [[double brackets]] and colour, and a line of counts.

    Readable without colour: `preview(...).plain`. New lines inside a trained stretch are shown as `\\n`, as they
    are trained tokens like any other.

    >>> rich.print(preview(renderer.render(row, "row 0"), tokenizer))  # doctest: +SKIP
    """
    text = _marked(rendered, tokenizer)
    _end_line(text)
    count, total = rendered.num_trained, len(rendered.tokens)
    return text.append(f"-- {count:,} of {total:,} tokens are trained ({count / total:.0%}), shown in [[ ]]")


def preview_pair(pair: RenderedPair, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The prompt once, both answers as `preview` shows them, each under its name, and a line of counts."""
    from rich.text import Text

    prompt = pair.chosen.tokens[: pair.prompt_tokens].tolist()
    text = Text(str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False)), CONTEXT_STYLE)
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _end_line(text)
        text.append(f"-- {name}:\n").append(_marked(side, tokenizer, pair.prompt_tokens))
    _end_line(text)
    counts = f"{pair.chosen.num_trained:,} tokens of chosen and {pair.rejected.num_trained:,} of rejected are trained"
    return text.append(f"-- {counts}, shown in [[ ]], after {pair.prompt_tokens:,} tokens of prompt")


def preview_prompt(row: RLRow, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The prompt as the sampler gets it, and a line with its length and the row's other fields."""
    from rich.text import Text

    text = Text(str(tokenizer.decode(list(row.prompt_tokens), clean_up_tokenization_spaces=False)), CONTEXT_STYLE)
    _end_line(text)
    others = ", ".join(f"{key} = {value!r:.200}" for key, value in row.fields.items() if key != "messages")
    return text.append(f"-- {len(row.prompt_tokens):,} tokens of prompt; {others or 'no other fields'}")


def _marked(rendered: RenderedRow, tokenizer: PreTrainedTokenizerBase, first: int = 0) -> Text:
    """The text from token `first` on, each stretch of trained tokens in brackets and colour."""
    from rich.text import Text

    text = Text()
    tokens, trained = rendered.tokens[first:].tolist(), (rendered.weights[first:] != 0).tolist()
    for start, stop in _stretches(trained):
        piece = str(tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False))
        if trained[start]:
            text.append(f"[[{piece.replace(chr(10), chr(92) + 'n')}]]", TRAINED_STYLE)
        else:
            text.append(piece, CONTEXT_STYLE)
    return text


def _end_line(text: Text) -> None:
    if not text.plain.endswith("\n"):
        text.append("\n")


def _stretches(flags: list[bool]) -> list[tuple[int, int]]:
    """Neighbouring equal flags as (start, stop)."""
    edges = [0, *(i for i in range(1, len(flags)) if flags[i] != flags[i - 1]), len(flags)]
    return list(itertools.pairwise(edges))
