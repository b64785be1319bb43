"""Which sequences of a request begin alike, so that what they begin with passes through the decoder once.

A plan from token ids alone. How a decoder computes such a group is in `cookbook.backend.branches`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cookbook.backend.branches import Tree

__all__ = ["PrefixGroup", "prefix_groups", "shared_batches"]

_MIN_SAVED = 0.25  # of a group's tokens: below, rows side by side in one matrix are as fast
_MIN_SAVED_PAIRS = 0.1  # where all rows are short pairs, as two answers to each prompt are
_SHORT = 256  # tokens: up to here attention over branches is no slower than the plain one
_MAX_SPREAD = 8


@dataclass(frozen=True)
class PrefixGroup:
    """Row numbers of sequences that agree in their first `prefix` tokens, and have at least one token more each."""

    prefix: int
    rows: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not pass."""
        return (len(self.rows) - 1) * self.prefix

    def tree(self, lengths: Sequence[int]) -> Tree:
        """Its shape, for the decoder. lengths: of all sequences of the request."""
        return Tree(self.prefix, tuple(lengths[row] - self.prefix for row in self.rows))

    def tokens(self, sequences: Sequence[Tensor]) -> Tensor:
        """int64 (M,): the prefix, then what follows it in each row."""
        return torch.cat(
            [sequences[self.rows[0]][: self.prefix], *(sequences[row][self.prefix :] for row in self.rows)]
        )


def prefix_groups(sequences: Sequence[Tensor]) -> list[PrefixGroup]:
    """The disjoint groups that save most, of those that save at least a quarter of their tokens (short pairs: a tenth).

    Args:
        sequences: int64 (T,) each.

    Neighbours in sorted order are merged, those that share most first, and a merged group stays as it was found when
    its parts save more apart: the best choice of groups with one prefix each.
    """
    if len(sequences) < 2:
        return []
    tokens = [sequence.tolist() for sequence in sequences]
    order = sorted(range(len(tokens)), key=lambda row: (tokens[row], row))
    shared = [_num_shared(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    ends_at = {place: (place, list[PrefixGroup]()) for place in range(len(order))}  # last place -> first place, groups
    starts_at = {place: place for place in range(len(order))}  # first place -> last place
    for place in sorted(range(len(shared)), key=lambda place: -shared[place]):
        first, left = ends_at.pop(place)
        last = starts_at.pop(place + 1)
        _, right = ends_at.pop(last)
        whole = PrefixGroup(shared[place], tuple(order[first : last + 1]))
        apart = left + right
        ends_at[last] = (first, [whole] if whole.saved > sum(group.saved for group in apart) else apart)
        starts_at[first] = last
    ((_, groups),) = ends_at.values()
    are_pairs = 2 * len(groups) == len(tokens) and all(len(group.rows) == 2 for group in groups)
    min_saved = _MIN_SAVED_PAIRS if are_pairs and max(map(len, tokens)) <= _SHORT else _MIN_SAVED
    return [group for group in groups if group.saved >= min_saved * sum(len(tokens[row]) for row in group.rows)]


def shared_batches(groups: Sequence[PrefixGroup], lengths: Sequence[int], budget: int) -> list[list[PrefixGroup]]:
    """The groups in micro-batches of at most `budget` tokens, or of twice the longest sequence where that is more.

    A group that does not fit is cut, and its prefix passes once for each part. So is one whose rows, each padded to the
    longest of them and with the prefix in it, have more than `_MAX_SPREAD` x budget places: attention keeps the keys
    and values of them all.
    """
    budget = max([budget, *(2 * lengths[row] for group in groups for row in group.rows)])
    batches: list[list[PrefixGroup]] = []
    room = room_spread = 0
    for group in sorted(groups, key=lambda group: -_size(group, lengths)):
        for part in _cut(group, lengths, budget):
            size, spread = _size(part, lengths), _spread(part, lengths)
            if size > room or spread > room_spread:
                batches.append([])
                room, room_spread = budget, _MAX_SPREAD * budget
            batches[-1].append(part)
            room -= size
            room_spread -= spread
    return batches


def _cut(group: PrefixGroup, lengths: Sequence[int], budget: int) -> list[PrefixGroup]:
    """Parts of about the same number of rows that fit; longest rows first, so that rows of a part are alike."""
    rows = sorted(group.rows, key=lambda row: (-lengths[row], row))
    num_parts = 1
    while True:
        size = -(-len(rows) // num_parts)
        parts = [PrefixGroup(group.prefix, tuple(rows[at : at + size])) for at in range(0, len(rows), size)]
        if size == 1 or all(_fits(part, lengths, budget) for part in parts):
            return parts
        num_parts += 1


def _fits(group: PrefixGroup, lengths: Sequence[int], budget: int) -> bool:
    return _size(group, lengths) <= budget and _spread(group, lengths) <= _MAX_SPREAD * budget


def _spread(group: PrefixGroup, lengths: Sequence[int]) -> int:
    """Places of keys and values that attention keeps for a group."""
    return len(group.rows) * max(lengths[row] for row in group.rows)


def _size(group: PrefixGroup, lengths: Sequence[int]) -> int:
    return sum(lengths[row] for row in group.rows) - group.saved


def _num_shared(one: Tensor, other: Tensor) -> int:
    """Length of the common beginning, at most one less than either sequence has."""
    length = min(len(one), len(other)) - 1
    differs = torch.ne(one[:length], other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
