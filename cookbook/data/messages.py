"""What a valid list of chat messages is, and which of them are trained. How they become text: template.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cookbook.errors import DataError

__all__ = ["ROLES", "Messages", "check_messages", "is_trained"]

ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


def check_messages(row: Mapping[str, Any], where: str) -> Messages:
    """The row's messages, if they are a conversation; `where` names the row in errors.

    Raises:
        DataError: names the row, the message and what is wrong with it.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        got = f"messages = {messages!r}" if "messages" in row else f"keys: {sorted(row)}"
        raise DataError(f'{where} has no messages ({got:.200}). Write {{"messages": [{{"role", "content"}}, ...]}}.')
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where} has tools = {tools!r:.100}. Give a list of JSON schemas, or leave it out.")
    for index, message in enumerate(messages):
        _check_message(message, f"{where}, messages[{index}]")
    return messages


def is_trained(messages: Messages, index: int, train_on_what: str) -> bool:
    """Whether message `index` is trained: its own weight if it has one, else by `train_on_what`."""
    weight = messages[index].get("weight")
    if weight is not None:
        return bool(weight)
    if train_on_what == "all_messages":
        return True
    if messages[index]["role"] != "assistant":
        return False
    later = messages[index + 1 :]
    return train_on_what == "all_assistant_messages" or all(message["role"] != "assistant" for message in later)


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f'{where} is {message!r:.100}, not an object. Write {{"role": ..., "content": ...}}.')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has role {role!r:.100}. Use one of: {', '.join(ROLES)}.")
    calls = message.get("tool_calls")
    if calls is not None and not _are_tool_calls(role, calls):
        raise DataError(
            f"{where} has tool_calls = {calls!r:.100}. Only an assistant message may have them, as a list of "
            '{"type": "function", "function": {"name", "arguments"}}.'
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise DataError(f"{where} has content {content!r:.100}. Write a string.")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{where} has weight {weight!r:.100}. Use 0 (not trained) or 1 (trained), or leave it out.")
    if role == "assistant" and not content and not calls and weight != 0:
        raise DataError(f"{where} is an empty answer. Remove the row, or give the message the weight 0.")


def _are_tool_calls(role: object, calls: object) -> bool:
    if role != "assistant" or not isinstance(calls, list):
        return False
    functions = [call.get("function") if isinstance(call, dict) else None for call in calls]
    return all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)
