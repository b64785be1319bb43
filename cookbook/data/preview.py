"""A row as the trainer or the sampler will see it, for people to check before they train."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from cookbook.data.rendering import RenderedRow

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from cookbook.data.rl import RLRow

__all__ = ["preview", "preview_prompt"]

TRAINED_STYLE = "bold green underline"
CONTEXT_STYLE = "dim"


def preview(rendered: RenderedRow, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row's text, each stretch of trained tokens in [[double brackets]] and colour, and a line of counts.

    Readable without colour: `preview(...).plain`. New lines inside a trained stretch are shown as `\\n`, as they
    are trained tokens like any other.

    >>> rich.print(preview(renderer.render(row, "row 0"), tokenizer))  # doctest: +SKIP
    """
    from rich.text import Text

    text = Text()
    tokens, trained = rendered.tokens.tolist(), (rendered.weights != 0).tolist()
    for start, stop in _stretches(trained):
        piece = str(tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False))
        if trained[start]:
            text.append(f"[[{piece.replace(chr(10), chr(92) + 'n')}]]", TRAINED_STYLE)
        else:
            text.append(piece, CONTEXT_STYLE)
    if not text.plain.endswith("\n"):
        text.append("\n")
    count, total = rendered.num_trained, len(tokens)
    return text.append(f"-- {count:,} of {total:,} tokens are trained ({count / total:.0%}), shown in [[ ]]")


def preview_prompt(row: RLRow, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The prompt as the sampler gets it, and a line with its length and the row's other fields."""
    from rich.text import Text

    text = Text(str(tokenizer.decode(list(row.prompt_tokens), clean_up_tokenization_spaces=False)), CONTEXT_STYLE)
    if not text.plain.endswith("\n"):
        text.append("\n")
    others = ", ".join(f"{key} = {value!r:.200}" for key, value in row.fields.items() if key != "messages")
    return text.append(f"-- {len(row.prompt_tokens):,} tokens of prompt; {others or 'no other fields'}")


def _stretches(flags: list[bool]) -> list[tuple[int, int]]:
    """Neighbouring equal flags as (start, stop)."""
    edges = [0, *(i for i in range(1, len(flags)) if flags[i] != flags[i - 1]), len(flags)]
    return list(itertools.pairwise(edges))
