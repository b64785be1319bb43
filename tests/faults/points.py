"""Kill points: the phase boundaries of a run, by name, and what is wrapped to notice that one is passed.

Nothing of this is in the product: the driver wraps its functions from outside, and a name that is not there any more
is an error. Every phase has two points, `PHASE.before` and `PHASE.after`; a phase that raises has no `after`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.faults.processes import ROLES

__all__ = ["PHASES", "Kill", "points_of", "wrap_phases"]

PHASES: dict[str, tuple[str, ...]] = {
    # phase: the functions that are it, as module:name or module:Class.name
    "open": ("cookbook.run:RunDirectory.open",),
    "pin": ("cookbook.run:RunDirectory.pin_data",),
    "intend": ("cookbook.ledger:ResourceLedger.intend",),
    "create": (
        "fireworks.training.sdk:TrainerJobManager.create",
        "fireworks.training.sdk:DeploymentManager.create_or_get",
    ),
    "confirm": ("cookbook.ledger:ResourceLedger.confirm",),
    "session": ("cookbook.client:ReconnectableClient._connect",),
    "load": ("cookbook.client:ReconnectableClient.load_state_with_optimizer",),
    "start": ("tasks.run:Run.start",),
    "gradient": ("cookbook.client:ReconnectableClient.forward_backward_custom",),
    "optimizer": ("cookbook.client:ReconnectableClient.optim_step",),
    "train_step": ("cookbook.client:ReconnectableClient.train_step",),
    "log": ("tasks.run:Run.log_step",),
    "save": ("cookbook.client:ReconnectableClient.begin_save_state",),
    "save_confirmed": ("cookbook.checkpoints:PendingCheckpoint.confirm",),
    "commit": ("cookbook.checkpoints:append_jsonl",),
    "upkeep": ("cookbook.upkeep:Upkeep.after_commit",),
    "retire": ("cookbook.retention:_write_begun",),
    "delete": ("cookbook.retention:delete_snapshot", "cookbook.upkeep:delete_snapshot"),
    "mirror_object": ("cookbook.mirror_store:MirrorStore.write_object",),
    "mirror_pointer": ("cookbook.mirror_store:MirrorStore.write_pointer",),
    "snapshot": ("cookbook.client:ReconnectableClient.save_weights_for_sampler_ext",),
    "hot_load": ("cookbook.weight_sync:WeightSync._load",),
    "verify": ("cookbook.weight_sync:WeightSync._verify",),
    "collect": ("cookbook.rollouts.collect:RolloutCollector.collect",),
    "record": ("cookbook.rollouts.store:RolloutStore.write_step",),
    "references": ("cookbook.reference_cache:ReferenceCache.put",),
    "release_reference": ("tasks.references:release",),
    "evaluate": ("tasks.run:Run.log_evaluation",),
    "promote": ("tasks.promotion:promote_checkpoint",),
    "provenance": ("tasks.promotion:record_provenance",),
    "release": ("tasks.run:Run._release",),
    "freed": ("cookbook.ledger:ResourceLedger.freed",),
    "finish": ("cookbook.run:RunDirectory.finish",),
}
"""What happens in a run, about in the order in which it happens first."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `process` at the n-th passage of a point, counted from the start of the flow's process.

    As text: `flow@commit.before:2`. The process is "flow" or one of processes.ROLES. A moment that is no phase boundary
    is given in seconds from the start: `trainer@1.25s`. `pause@...` is SIGSTOP for the flow: it lives and does nothing.
    """

    process: str
    point: str
    """"" for a moment."""
    passage: int = 1
    after_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Kill:
        process, _, rest = text.partition("@")
        if process not in ("flow", "pause", *ROLES):
            raise ValueError(f"{text!r}: there is no process {process!r}. There are: flow, pause, {', '.join(ROLES)}")
        if rest.endswith("s") and ":" not in rest:
            return cls.at(process, float(rest[:-1]))
        point, _, passage = rest.partition(":")
        if point not in points_of(PHASES):
            raise ValueError(f"{text!r}: there is no kill point {point!r}. There are: {', '.join(points_of(PHASES))}")
        return cls(process, point, int(passage or 1))

    @classmethod
    def at(cls, process: str, seconds: float) -> Kill:
        """At a moment, whatever happens then."""
        return cls(process, "", 1, round(seconds, 3))

    def __str__(self) -> str:
        return f"{self.process}@{self.point}:{self.passage}" if self.point else f"{self.process}@{self.after_s}s"


def points_of(phases: Iterable[str]) -> list[str]:
    """The names of the points of these phases."""
    return [f"{phase}.{when}" for phase in phases for when in ("before", "after")]


def wrap_phases(passed: Callable[[str], None]) -> None:
    """Have `passed` called with the name of each point, in whichever thread passes it, from now on in this process."""
    for phase, targets in PHASES.items():
        for target in targets:
            owner, name = _owner(target)
            if not hasattr(owner, name):
                raise AttributeError(f"kill points {phase}.*: {target} does not exist. Name the function that is it.")
            inherited = name not in vars(owner)
            raw = getattr(owner, name) if inherited else vars(owner)[name]
            if isinstance(raw, classmethod):
                setattr(owner, name, classmethod(_wrapped(phase, raw.__func__, passed)))
            else:
                setattr(owner, name, _wrapped(phase, raw, passed))


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _wrapped(phase: str, function: Callable[..., Any], passed: Callable[[str], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        passed(f"{phase}.before")
        result = function(*args, **kwargs)
        passed(f"{phase}.after")
        return result

    return wrapper
