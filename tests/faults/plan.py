"""Which kills a cell of the suite gets: every phase boundary of its recipe for the flow, some of them for each other
process, and seeded random moments. The seed chooses passages, moments, and whom which boundary hits."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.faults.points import PHASES, Kill, points_of

__all__ = ["kills_for", "phases_of", "roles_of"]

_EARLY = ("open", "pin", "intend", "create", "confirm", "session", "start")
_LATE = ("promote", "provenance", "release", "finish", "freed")
_ONCE = ("load", "snapshot", "release_reference")
"""What happens once a start, at least in some recipes."""
_WITH_REFERENCE = ("references.before", "references.after", "release_reference.before")
"""Where DPO's reference trainer, which is freed in the first epoch, is there to be killed."""
_ONLY = {
    "collect": ("rl",),
    "record": ("rl",),
    "references": ("dpo",),
    "release_reference": ("dpo",),
    "hot_load": ("rl", "dpo"),
    "verify": ("rl", "dpo"),
}
RANDOM_KILLS = 5


def roles_of(recipe: str, seed: int) -> tuple[str, ...]:
    """The processes beside the flow that a run of this recipe has."""
    shared = ("trainer", "control-plane", "supervisor")
    if recipe == "rl":
        return (*shared, "deployment")
    if recipe == "dpo":
        return (*shared, "deployment" if seed % 2 else "reference")
    return shared


def phases_of(recipe: str, seed: int) -> list[str]:
    """The phases that a run of this recipe goes through."""
    phases = [phase for phase in PHASES if recipe in _ONLY.get(phase, (recipe,))]
    missing: tuple[str, ...] = () if seed % 2 else ("mirror_object", "mirror_pointer")
    has_custom_loss = recipe in ("dpo", "orpo") or (recipe == "rl" and seed % 2 == 1)
    missing += ("train_step",) if has_custom_loss else ("gradient", "optimizer")
    if recipe == "dpo":
        missing += ("release_reference",) if seed % 2 else ("hot_load", "verify")
    return [phase for phase in phases if phase not in missing]


def kills_for(recipe: str, seed: int, seconds: float) -> list[Kill]:
    """The kills of one cell, in an order in which they can happen. `seconds`: length of an undisturbed run."""
    return list(dict.fromkeys(_kills(recipe, seed, seconds)))


def _kills(recipe: str, seed: int, seconds: float) -> Iterator[Kill]:
    drawn = random.Random(f"{recipe}/{seed}")
    phases = phases_of(recipe, seed)
    roles = roles_of(recipe, seed)
    loop = [phase for phase in phases if phase not in (*_EARLY, *_LATE)]
    for point in points_of(phase for phase in phases if phase in _EARLY):
        yield Kill("flow", point)
    middle = points_of(loop)
    drawn.shuffle(middle)
    for number, point in enumerate(middle):
        if number % 2 == seed % 2:
            role, where = drawn.choice(roles), drawn.choice(middle)
            yield _at(role, drawn.choice(_WITH_REFERENCE) if role == "reference" else where, drawn)
        yield _at("flow", point, drawn)
    for _ in range(RANDOM_KILLS):
        yield Kill.at(drawn.choice(("flow", "flow", *roles)), drawn.uniform(0, seconds / 3))
    for role in roles:
        late = _WITH_REFERENCE if role == "reference" else points_of(_LATE)
        yield Kill(role, drawn.choice(late))
    for point in points_of(phase for phase in phases if phase in _LATE):
        yield Kill("flow", point)


def _at(process: str, point: str, drawn: random.Random) -> Kill:
    """At one of the first passages."""
    passage = drawn.randint(1, 2)
    return Kill(process, point, 1 if point.partition(".")[0] in _ONCE else passage)
