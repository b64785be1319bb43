"""From the text in a config to a reward: ready ones by short names, one's own as `module:function`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from typing import Any

from cookbook.errors import DataError, RewardError
from cookbook.rewards.answers import check_number, check_text, exact, numeric
from cookbook.rewards.countdown import check_countdown, countdown
from cookbook.rewards.format import format_reward, pattern_problem
from cookbook.rewards.math import math_reward
from cookbook.rewards.reasoning import PREFIX, parse_spec, reasoning_reward
from cookbook.rewards.records import LoadedReward

__all__ = ["READY", "import_function", "load_reward", "spec_problem"]

READY = ("exact", "numeric", "math", "countdown", "format:REGEX", f"{PREFIX}NAME?option=value")
LONGEST_LIMIT_S = 5.0
"""Seconds for one text by the ready rewards that limit themselves."""
_SIMPLE = {
    "exact": LoadedReward("exact", exact, check_text),
    "numeric": LoadedReward("numeric", numeric, check_number),
    "countdown": LoadedReward("countdown", countdown, check_countdown),
}
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def load_reward(spec: str, *, timeout_s: float = 30.0) -> LoadedReward:
    """The reward that `spec` names.

    exact, numeric, math, countdown, format, format:REGEX, reasoning_gym:NAME?option=value, or module:function with the
    current directory importable. `timeout_s` is the limit that `score` will be called with.

    Raises:
        RewardError: there is no such reward, the module cannot be imported, or what it holds is not a function of a
            completion and a row.
    """
    problem = spec_problem(spec)
    if problem is not None:
        raise RewardError(problem)
    limit_s = min(LONGEST_LIMIT_S, timeout_s)
    if spec in _SIMPLE:
        return _SIMPLE[spec]
    if spec == "math":
        return math_reward(limit_s)
    if _is_format(spec):
        return format_reward(spec, limit_s)
    if spec.startswith(PREFIX):
        return reasoning_reward(spec, limit_s)
    function = import_function(spec)
    try:
        inspect.signature(function).bind("", {})
    except TypeError as error:
        raise RewardError(
            f"reward {spec!r} cannot be called with a completion and a row: {error}. Write it as "
            "`def reward(completion: str, row: dict) -> float`."
        ) from error
    except ValueError:  # a function in C without a signature
        pass
    return LoadedReward(spec, function)


def spec_problem(spec: str) -> str | None:
    """What is wrong with the form of a reward's name, or None. Imports nothing of the user's."""
    if spec in _SIMPLE or spec == "math":
        return None
    if _is_format(spec):
        return pattern_problem(spec)
    if spec.startswith(PREFIX):
        try:
            parse_spec(spec)
        except DataError as error:
            return str(error)
        return None
    if re.search(r"\.py:|/", spec):
        return f"{spec!r} is a file. Write it as a module: rewards:score for the function score of rewards.py."
    if _PATH.fullmatch(spec):
        return None
    near = difflib.get_close_matches(spec, [*_SIMPLE, "math", "format"], n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Use module:function, or one of: {', '.join(READY)}."
    return f"there is no reward {spec!r}. {remedy}"


def import_function(spec: str) -> Any:
    """What `module:attribute` names; modules in the current directory are found too.

    Raises:
        RewardError: the module or the attribute is not there, importing it fails, or it cannot be called.
    """
    module_name, _, attribute = spec.partition(":")
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()  # the module may be younger than this process
    try:
        module = importlib.import_module(module_name)
        found = functools.reduce(getattr, attribute.split("."), module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            remedy = f"Start from the folder that holds it (now {directory}), or install it."
            raise RewardError(f"{spec!r}: there is no module {error.name!r}. {remedy}") from error
        raise RewardError(f"{spec!r}: importing {module_name} failed: {error}. Install what it needs.") from error
    except AttributeError as error:
        raise RewardError(f"{spec!r}: {error}. Correct the name or the module.") from error
    except Exception as error:  # whatever a module of the user's does when it is imported
        what = f"{type(error).__name__}: {error}"
        raise RewardError(f"{spec!r}: importing {module_name} failed: {what}. Correct it.") from error
    if not callable(found):
        raise RewardError(f"{spec!r} is {type(found).__name__}, not a function. Name a function.")
    return found


def _is_format(spec: str) -> bool:
    return spec == "format" or spec.startswith("format:")
