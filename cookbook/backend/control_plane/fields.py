"""The fields of a create or update request, with the checks that name a field and its value when it cannot be used."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cookbook.backend.control_plane.answers import ApiError, Code

__all__ = ["Fields", "bad", "new_id"]

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DURATION = re.compile(r"(\d+(?:\.\d{1,9})?)s")
_MAX_DISPLAY_NAME = 64


@dataclass(frozen=True)
class Fields:
    """One table of fields. Every method but `context_length` reads one; all raise ApiError (400)."""

    values: dict[str, Any]

    def whole(self, name: str, default: int, *, least: int) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad(name, value, f"must be a whole number, {least} or more")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise bad(name, value, "must be true or false")
        return value

    def text(self, name: str) -> str:
        """A text, empty by default; a displayName has fewer than 64 characters."""
        value = self.values.get(name, "")
        if not isinstance(value, str):
            raise bad(name, value, "must be a text")
        if name == "displayName" and len(value) >= _MAX_DISPLAY_NAME:
            raise bad(name, value, f"must be a text of fewer than {_MAX_DISPLAY_NAME} characters")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise bad(name, value, "must be a list of strings")
        return value

    def table(self, name: str) -> dict[str, str]:
        value = self.values.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise bad(name, value, "must be an object whose values are strings")
        return value

    def duration_s(self, name: str, default: float, *, at_most: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        matched = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if matched is None:
            raise bad(name, value, "must be a duration in seconds such as '3600s'")
        if not 0 < float(matched.group(1)) <= at_most:
            raise bad(name, value, f"must be more than 0s and at most {at_most:.0f}s")
        return float(matched.group(1))

    def context_length(self, shape_limit: int, model_limit: int | None) -> int:
        """maxContextLength in tokens: as requested, else the shape's, never above what the baseModel was made for."""
        requested = self.whole("maxContextLength", 0, least=0)
        if model_limit is None:
            return requested or shape_limit
        if requested > model_limit:
            raise bad(
                "maxContextLength",
                requested,
                f"is more than baseModel {self.values['baseModel']} was made for ({model_limit}). "
                f"Ask for {model_limit} or fewer",
            )
        return requested or min(shape_limit, model_limit)


def new_id(query: Mapping[str, str], name: str, prefix: str) -> str:
    """The id that a create call gives its resource in the parameter `name`, or a random one.

    Raises:
        ApiError: it is no id (400).
    """
    given = query.get(name) or f"{prefix}-{secrets.token_hex(4)}"
    if not _ID.fullmatch(given):
        raise bad(name, given, "must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a-z or 0-9")
    return given


def bad(field: str, value: object, problem: str) -> ApiError:
    """The error (400) for a field that cannot be used."""
    return ApiError(Code.INVALID_ARGUMENT, f"{field} {value!r} {problem}.")
