"""Multi-turn rollouts: what answers the policy, and how that answer is put into the token stream.

Token in, token out: what the policy sampled is never rendered anew; only the text between two turns becomes tokens
here, as the tokenizer's chat template writes it. A ready environment: calculator.py. The loop over turns: turns.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from cookbook.data.template import ChatTemplate
from cookbook.errors import ConfigError, DataError, Problem
from cookbook.rollouts.filters import import_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Environment", "EnvironmentFactory", "EnvironmentReply", "TurnTemplate", "load_environment"]

_MARK = "\ue000turn\ue001"
"""Stands for a turn of the policy, to see what the template writes after it. Private-use characters."""


@dataclass(frozen=True)
class EnvironmentReply:
    """What the environment says to one turn of the policy."""

    text: str | None = None
    """Content of the message that follows the turn. None = nothing, which ends the rollout."""
    done: bool = False
    """Whether the rollout ends here; a text is not shown then."""
    reward: float | None = None
    """Added to the rewards of the other turns. Where no turn has one, the reward function scores the last turn."""
    role: str = "user"
    """Of the message: "user" or "tool", what the chat template knows."""


@runtime_checkable
class Environment(Protocol):
    """The other side of one rollout. Each rollout gets one of its own, so that it may keep state."""

    async def step(self, row: Mapping[str, Any], text: str, tokens: Sequence[int]) -> EnvironmentReply:
        """Answer a turn.

        Args:
            row: the whole row of the data file.
            text: the turn as text, without marks of the chat template.
            tokens: the turn as it was sampled, its end-of-turn token included.
        """


EnvironmentFactory: TypeAlias = Callable[[], Environment]


def load_environment(spec: str | None) -> EnvironmentFactory | None:
    """What makes an environment for a rollout, as `environment` of the config names it; None = one turn only.

    "calculator" is the ready one; module:function names a function (or class) without arguments.

    Raises:
        ConfigError: there is no such function, or what it makes is no environment.
    """
    if spec is None:
        return None
    if spec == "calculator":
        from cookbook.rollouts.calculator import Calculator

        return Calculator
    factory = import_for(spec, "environment")
    try:
        made = factory()
    except Exception as error:  # the user's code
        what = f"{spec!r} raised {type(error).__name__}: {error}."
        raise ConfigError([Problem("environment", what, "It is called without arguments, once a rollout.")]) from error
    if not isinstance(made, Environment):
        what = f"{spec!r} made a {type(made).__name__}, which has no method `step`."
        raise ConfigError([Problem("environment", what, "Return a cookbook.rollouts.environment.Environment.")])
    return factory


@dataclass(frozen=True, eq=False)
class TurnTemplate:
    """Tokens between two turns of the policy, for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends a turn of the policy; None where the template has none."""
        text = self.template.end_of_turn
        return None if text is None else int(self.tokenizer.convert_tokens_to_ids(text))

    def between(
        self, messages: Sequence[Mapping[str, Any]], turn: Sequence[int], reply: EnvironmentReply, where: str
    ) -> tuple[int, ...]:
        """Tokens from the end of a sampled turn to where the next one begins: marks, the reply, the assistant's header.

        `messages` is the conversation before the turn. The end-of-turn token is among them only where `turn` does not
        end with it. Marks of the template that the reply spells are taken out: it cannot speak for another role.

        Raises:
            DataError: the chat template refuses such a conversation.
        """
        said = {"role": reply.role, "content": self._plain(reply.text or "")}
        spoken = [*messages, {"role": "assistant", "content": _MARK}, said]
        rendered = self.template.render(spoken, None, where, add_generation_prompt=True)
        _, found, after = rendered.rpartition(_MARK)
        if not found:
            raise DataError(
                f"{where}: the chat template leaves out earlier turns, so a rollout can have one turn only."
            )
        anchor = self.template.end_of_turn or ""
        if anchor and not after.startswith(anchor):
            raise DataError(f"{where}: the chat template ends earlier turns otherwise than the last: {after[:40]!r}.")
        # With the mark in front, as a tokenizer may write the start of a text in a way of its own.
        tokens = self._encode(after)
        ends = anchor and turn and turn[-1] == self.end_of_turn
        return tuple(tokens[len(self._encode(anchor)) :] if ends else tokens)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Tokens of a whole rollout as text, marks included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _plain(self, text: str) -> str:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        pattern = "|".join(re.escape(mark) for mark in sorted(special, key=len, reverse=True))
        while pattern and (shorter := re.sub(pattern, "", text)) != text:  # taking one out may join another
            text = shorter
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
