"""Memory for what a save captures: weights and moments as they are, while training goes on.

What becomes of a captured state is not known here (operations.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cookbook.backend.trainer.state import TrainingState

__all__ = ["Staging"]

_log = logging.getLogger(__name__)

_SHARE = 0.8
"""Of the memory that is available, what a buffer may take at most: the next step needs some too."""


class Staging:
    """One buffer, made for the first state that is captured and used again for those after it."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    @torch.no_grad()
    def capture(self, state: TrainingState) -> TrainingState | None:
        """A copy of the state, in the place of the one captured before; None when there is no memory for it."""
        tensors = {**state.weights, **state.moments}
        buffer = self._of_size(sum(tensor.numel() for tensor in tensors.values()))
        if buffer is None:
            return None
        copies = _cut(buffer, tensors)
        torch._foreach_copy_(list(copies.values()), list(tensors.values()))
        return TrainingState(
            {name: copies[name] for name in state.weights}, {name: copies[name] for name in state.moments}
        )

    def drop(self) -> None:
        """Free the buffer, once nobody uses what was captured last."""
        self._buffer = None

    def _of_size(self, num_numbers: int) -> Tensor | None:
        if self._buffer is None or self._buffer.numel() < num_numbers:
            self._buffer = None  # before there is another
            wanted, available = 4 * num_numbers, _available_bytes()
            if available is not None and wanted > _SHARE * available:
                _log.warning("a save of %d MiB holds up training: %d MiB are free", wanted >> 20, available >> 20)
                return None
            try:
                self._buffer = torch.empty(num_numbers)
            except (MemoryError, RuntimeError) as error:  # torch's allocator raises the latter
                _log.warning("a save of %d MiB holds up training: %s", wanted >> 20, str(error).splitlines()[0])
        return self._buffer


def _cut(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Consecutive pieces of the buffer, in the shapes of these tensors."""
    pieces, start = {}, 0
    for name, tensor in like.items():
        pieces[name] = buffer[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return pieces


def _available_bytes() -> int | None:
    """Memory that can be had: of the machine, and of the control groups that this process is in. None = unknown."""
    limits = [*_machine_bytes(), *_group_bytes()]
    return min(limits) if limits else None


def _machine_bytes() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_bytes() -> Iterator[int]:
    """Of control groups, version 2. The file cache counts as used there, and can be had, but for files in memory."""
    root = Path("/sys/fs/cgroup")
    own = next((line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), None)
    folder = None if own is None else Path(os.path.normpath(f"{root}/{own}"))
    while folder is not None and folder.is_relative_to(root):
        limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
        if limit and used and limit[0] != "max":
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            yield int(limit[0]) - int(used[0]) + int(stat.get("file", 0)) - int(stat.get("shmem", 0))
        folder = folder.parent


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not this system, or not allowed
        return []
