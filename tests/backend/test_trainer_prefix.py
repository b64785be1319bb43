"""Groups are those that save most, every row once; micro-batches keep the budget or stay near the longest sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from cookbook.backend.branches import Tree
from cookbook.backend.trainer.prefix import PrefixGroup, prefix_groups, shared_batches


def sequences(*texts: str) -> list[Tensor]:
    return [torch.tensor(list(text.encode())) for text in texts]


def test_completions_are_grouped_by_prompt_and_not_by_what_all_prompts_share() -> None:
    rows = sequences("system: 1+1=2", "system: 3+4=7", "system: 1+1=3", "system: 3+4=?", "system: 1+1=2!")
    assert sorted(prefix_groups(rows), key=lambda group: group.prefix) == [
        PrefixGroup(12, (0, 4, 2)),
        PrefixGroup(12, (1, 3)),
    ]


def test_pair_with_more_in_common_does_not_break_up_its_group() -> None:
    rows = sequences("prompt: ab", "prompt: ac", "prompt: xy", "prompt: zz")
    assert prefix_groups(rows) == [PrefixGroup(8, (0, 1, 2, 3))]


def test_one_large_common_beginning_is_better_than_many_small_gains() -> None:
    rows = sequences(*("a long system prompt " + end for end in ("aa1", "aa2", "bb1", "bb2")))
    assert [group.prefix for group in prefix_groups(rows)] == [21]


def test_small_savings_are_left_alone() -> None:
    assert prefix_groups(sequences("abc" + "x" * 30, "abc" + "y" * 30)) == []
    assert prefix_groups(sequences("one")) == prefix_groups([]) == []


def test_short_pairs_share_a_prompt_that_is_shorter_than_their_answers() -> None:
    pairs = ["one " + "a" * 9, "one " + "b" * 9, "two " + "a" * 9, "two " + "b" * 9]
    assert sorted(group.rows for group in prefix_groups(sequences(*pairs))) == [(0, 1), (2, 3)]
    assert prefix_groups(sequences(*pairs, "and a row by itself")) == []
    assert prefix_groups(sequences("p" * 60 + "a" * 200, "p" * 60 + "b" * 200)) == []  # long ones: a quarter


def test_a_sequence_that_is_the_beginning_of_another_keeps_a_token_of_its_own() -> None:
    rows = sequences("same text", "same text", "same text and more")
    (group,) = prefix_groups(rows)
    assert (group.prefix, set(group.rows)) == (8, {0, 1, 2})
    lengths = [len(row) for row in rows]
    assert sorted(group.tree(lengths).continuations) == [1, 1, 10]


def test_many_equal_rows_are_planned_without_deep_recursion() -> None:
    (group,) = prefix_groups([torch.zeros(5, dtype=torch.int64)] * 3000)
    assert len(group.rows) == 3000


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [30] * 8 + [20] * 6 + [25, 12]
    groups = [PrefixGroup(10, tuple(range(8))), PrefixGroup(15, tuple(range(8, 14))), PrefixGroup(9, (14, 15))]
    batches = shared_batches(groups, lengths, 70)
    assert sorted(row for batch in batches for group in batch for row in group.rows) == list(range(16))
    assert all(sum(group.tree(lengths).num_tokens for group in batch) <= 70 for batch in batches)


def test_long_prompt_is_still_shared_by_as_many_rows_as_fit_twice_its_length() -> None:
    (batch, *_) = batches = shared_batches([PrefixGroup(90, tuple(range(30)))], [100] * 30, 50)
    assert [group.tree([100] * 30) for group in batch] == [Tree(90, (10,) * 10)]
    assert len(batches) == 3
