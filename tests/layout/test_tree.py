# SPDX-License-Identifier: Apache-2.0
"""TokenTree: equal prefixes are stored once, every path is its sequence, and a row keeps to its budget.

Mutations of sspo_ext/layout/tree.py, each caught by the test named:
  keys with the lowest byte first ("<i8")                         test_branches_are_in_the_order_of_their_ids
  `shared` one token too short                                    test_a_prefix_is_stored_once
  `end[path[kept:]]` as `end[path[kept + 1:]]`                    test_end_is_the_subtree
  `parent[start]` left at own - 1                                 test_paths_spell_the_sequences
  `_shared` across groups                                         test_groups_are_apart
  `_split` with `repeated[k]` alone as the price                  test_a_split_repeats_the_fewest_tokens
  `_split` that drops `shared_of` in the size                     test_budget
  the column's shift left out of `end`                            test_end_is_the_subtree
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.layout.tree import PADDING, ROOT, TokenTree

# Few different tokens, some of several bytes, so that prefixes are shared and bytes must be in order.
TOKENS = st.sampled_from([0, 1, 255, 256, 70000])
SEQUENCES = st.lists(st.lists(TOKENS, max_size=8), max_size=12)


def places(tree: TokenTree, b: int) -> list[int]:
    return tree.host_place[tree.host_offsets[b] : tree.host_offsets[b + 1]].tolist()


def path_of(tree: TokenTree, place: int) -> list[int]:
    """The places from the root to a place, found by `parent` alone."""
    row, column = divmod(place, tree.shape[1])
    path = []
    while column != ROOT:
        path.append(row * tree.shape[1] + column)
        column = int(tree.parent[row, column])
    return path[::-1]


def check(tree: TokenTree, sequences) -> None:
    """Everything that holds for every tree."""
    ids, depth = tree.input_ids.flatten(), tree.position_ids.flatten()
    assert tree.num_sequences == len(sequences) == len(tree.host_offsets) - 1
    used = set()
    for b, sequence in enumerate(sequences):
        at = places(tree, b)
        assert ids[at].tolist() == list(sequence)
        if at:
            assert path_of(tree, at[-1]) == at
        assert depth[at].tolist() == list(range(len(sequence)))
        used.update(at)
    # No token is there for nobody, and what is left is padding.
    padding = set((tree.parent.flatten() == PADDING).nonzero().flatten().tolist())
    assert used | padding == set(range(ids.numel())) and not used & padding
    assert tree.num_tokens == len(used)
    assert depth[sorted(padding)].sum() == 0


@settings(deadline=None, max_examples=200)
@given(SEQUENCES)
def test_paths_spell_the_sequences(sequences):
    check(TokenTree.from_sequences(sequences), sequences)


@settings(deadline=None, max_examples=200)
@given(SEQUENCES)
def test_a_prefix_is_stored_once(sequences):
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    tree = TokenTree.from_sequences(sequences)
    assert tree.num_tokens == len(prefixes)
    assert tree.num_unshared_tokens == sum(map(len, sequences))
    assert tree.sharing == (tree.num_unshared_tokens / len(prefixes) if prefixes else 1.0)


@settings(deadline=None, max_examples=100)
@given(SEQUENCES, st.sampled_from([None, 8, 13]))
def test_end_is_the_subtree(sequences, max_tokens):
    tree = TokenTree.from_sequences(sequences, max_tokens=max_tokens)
    rows, length = tree.shape
    column = torch.arange(length)
    for r in range(rows):
        seen = (column <= column[:, None]) & (column[:, None] < tree.end[r])
        for q in range(length):
            path = [q] if tree.parent[r, q] == PADDING else [p % length for p in path_of(tree, r * length + q)]
            assert seen[q].nonzero().flatten().tolist() == path


@settings(deadline=None, max_examples=100)
@given(SEQUENCES, st.randoms(use_true_random=False), st.sampled_from([None, 8, 13]))
def test_order_of_insertion_does_not_matter(sequences, random, max_tokens):
    order = list(range(len(sequences)))
    random.shuffle(order)
    groups = [len(s) % 2 for s in sequences]
    first = TokenTree.from_sequences(sequences, groups=groups, max_tokens=max_tokens)
    other = TokenTree.from_sequences(
        [sequences[b] for b in order], groups=[groups[b] for b in order], max_tokens=max_tokens
    )
    for name in ("input_ids", "position_ids", "parent", "end"):
        assert torch.equal(getattr(first, name), getattr(other, name)), name
    if max_tokens is None:  # a sequence that a split repeats may be at either place
        assert [places(first, b) for b in order] == [places(other, b) for b in range(len(order))]


@settings(deadline=None, max_examples=200)
@given(SEQUENCES, st.integers(8, 20))
def test_budget(sequences, max_tokens):
    tree = TokenTree.from_sequences(sequences, max_tokens=max_tokens)
    assert tree.shape[1] <= max_tokens
    check(tree, sequences)


def common(x, y) -> int:
    """The length of the prefix that two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))


def fewest(lengths, shared, max_tokens) -> int:
    """The fewest tokens of trees of consecutive sequences, by trying all cuts."""
    best = [0]
    for last in range(len(lengths)):
        size, found = 0, []
        for first in range(last, -1, -1):
            size += lengths[first] - (shared[first + 1] if first < last else 0)
            if size <= max_tokens:
                found.append(best[first] + size)
        best.append(min(found))
    return best[-1]


@settings(deadline=None, max_examples=200)
@given(SEQUENCES, st.integers(8, 20))
def test_a_split_repeats_the_fewest_tokens(sequences, max_tokens):
    ordered = sorted(s for s in sequences if s)
    shared = [0, *(common(x, y) for x, y in pairwise(ordered))]
    tree = TokenTree.from_sequences(sequences, max_tokens=max_tokens)
    assert tree.num_tokens == fewest([len(s) for s in ordered], shared, max_tokens)


def test_a_tree_that_fits_is_not_split():
    sequences = [[1, 2, 3, n] for n in range(20)]
    assert TokenTree.from_sequences(sequences, max_tokens=23).num_tokens == 23
    split = TokenTree.from_sequences(sequences, max_tokens=22)
    assert split.num_tokens == 26 and split.shape[0] == 2


def test_rows_are_filled():
    # Trees of 5, 3, 3, 2, 2, 5 tokens: 20 tokens in two rows of 10.
    sequences = [[10 * k + i for i in range(n)] for k, n in enumerate([5, 3, 3, 2, 2, 5], 1)]
    tree = TokenTree.from_sequences(sequences, max_tokens=10)
    assert tree.shape == (2, 10) and tree.num_tokens == 20
    assert TokenTree.from_sequences(sequences).shape == (4, 5)


def test_branches_are_in_the_order_of_their_ids():
    assert TokenTree.from_sequences([[5, 256], [5, 1], [0]], max_tokens=4).input_ids.tolist() == [[0, 5, 1, 256]]


def test_groups_are_apart():
    sequences = [[1, 2, 3], [1, 2, 4], [1, 2, 3]]
    tree = TokenTree.from_sequences(sequences, groups=[7, -1, 7])
    assert tree.num_tokens == 6 and tree.shape == (2, 3)
    assert places(tree, 0) == places(tree, 2) == [3, 4, 5]


def test_prefixes_duplicates_and_empty_sequences():
    sequences = [[], [4, 5], [4, 5, 6], [4, 5], [], [9]]
    tree = TokenTree.from_sequences(sequences)
    check(tree, sequences)
    assert tree.num_tokens == 4 and places(tree, 1) == places(tree, 3) == places(tree, 2)[:2]


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_nothing_is_one_position_of_padding(sequences):
    tree = TokenTree.from_sequences(sequences, pad_token_id=3)
    check(tree, sequences)
    assert tree.shape == (1, 1) and tree.input_ids.tolist() == [[3]] and tree.end.tolist() == [[1]]
    assert tree.num_tokens == 0 and tree.sharing == 1.0


def test_a_thousand_branches():
    rng = np.random.default_rng(0)
    sequences = [[1] * 50 + [n, *rng.integers(0, 3, n % 7)] for n in rng.permutation(1000)]
    tree = TokenTree.from_sequences(sequences)
    check(tree, sequences)
    assert tree.num_tokens == 50 + sum(len(s) - 50 for s in sequences)
    check(TokenTree.from_sequences(sequences, max_tokens=128), sequences)


def test_padding_and_multiple():
    tree = TokenTree.from_sequences([[1, 2, 3], [4]], pad_token_id=9, pad_to_multiple_of=4)
    assert tree.input_ids.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert tree.parent.tolist() == [[-1, 0, 1, -2], [-1, -2, -2, -2]]
    assert tree.end.tolist() == [[3, 3, 3, 4], [1, 2, 3, 4]]


def test_kinds_of_sequences_give_the_same_tree():
    ids = [[1, 2, 3], [1, 2]]
    expected = TokenTree.from_sequences(ids)
    for kind in (torch.tensor, np.array, lambda s: torch.tensor(s, dtype=torch.int32), tuple):
        tree = TokenTree.from_sequences([kind(s) for s in ids])
        assert torch.equal(tree.input_ids, expected.input_ids) and torch.equal(tree.host_place, expected.host_place)


def test_to_moves_what_is_not_of_the_host():
    tree = TokenTree.from_sequences([[1, 2]]).to("meta")
    assert {tree.input_ids.device.type, tree.end.device.type, tree.device.type} == {"meta"}
    assert tree.host_place.device.type == "cpu"
    assert repr(tree) == "TokenTree(sequences=1, shape=(1, 2), tokens=2, unshared=2, device=meta)"


@pytest.mark.parametrize(
    ("sequences", "options", "error", "message"),
    [
        ([[1], [1, 2, 3]], {"max_tokens": 2}, ValueError, "at most max_tokens=2 tokens, got 3 in sequence 1"),
        ([[1], [2, -100]], {}, ValueError, "at least 0, got -100 at 1 of sequence 1"),
        ([[1], [2.5]], {}, TypeError, "sequences: expected integers, got .* as sequence 1"),
        ([[[1]]], {}, ValueError, "one dimension, got .* as sequence 0"),
        ([[1], [2]], {"groups": [1]}, ValueError, "groups: expected one number for each of 2 sequences"),
        ([[1]], {"groups": ["a"]}, TypeError, "groups: expected integers"),
        ([[1]], {"max_tokens": 0}, ValueError, "max_tokens: expected a whole number of at least 1"),
        ([[1]], {"pad_token_id": None}, TypeError, "pad_token_id: expected a whole number"),
        ([[1]], {"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of: expected"),
    ],
)
def test_errors(sequences, options, error, message):
    with pytest.raises(error, match=message):
        TokenTree.from_sequences(sequences, **options)
