# SPDX-License-Identifier: Apache-2.0
"""StepLayout.from_tree: which position predicts which token, what sequences share, and every message.

Mutations of sspo_ext/layout, each caught by the test named (on a copy of the package):
  the position before a token in the grid, not on its path   test_golden
  a row for each sequence's token, shared or not              test_golden
  one row a position, whatever it predicts                    test_golden
  steps, offsets or weights of the tree's order               test_tokens_are_those_of_the_sequences
  row_of names a position's last row                          test_every_token_has_its_row
  a table of rows where nothing is shared                     test_nothing_shared_needs_no_table
  tree_rows stays where it was                                test_to_moves_the_table
"""

import pickle

import pytest
import torch
from helpers.tree import pad, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.layout.steps import StepLayout
from sspo_ext.layout.tree import TokenTree
from sspo_ext.losses.pref import step_pref_loss

TOKENS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [5, 6], []]  # a branch after 6, a duplicate, a prefix, an empty one
IDS = [[-1, 0, 0, 1], [-1, 0, 1], [-1, -1, -1, 0], [-1, 0], []]


def layout_of(tokens, ids, labels=None, **options):
    tree = TokenTree.from_sequences(tokens)
    given_labels = [torch.tensor(s, dtype=torch.int64) for s in (tokens if labels is None else labels)]
    return tree, StepLayout.from_tree(tree, given_labels, [torch.tensor(i, dtype=torch.int64) for i in ids], **options)


def test_golden():
    """The grid is 5 6 7 8 9: both 7 and 9 are predicted at 6, whose position is 1, and 9 stands at position 4."""
    tree, layout = layout_of(TOKENS, IDS)
    assert tree.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert (layout.rows.tolist(), layout.labels.tolist()) == ([0, 1, 2, 1], [6, 7, 8, 9])
    assert layout.row_of.tolist() == [0, 1, 2, -1, -1]
    assert layout.tree_rows.shared.row.tolist() == [0, 1, 2, 0, 3, 2, 0]
    assert layout.places.tolist() == [1, 2, 3, 1, 4, 3, 1]
    assert layout.step_offsets.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert layout.step_sequence.tolist() == [0, 0, 1, 1, 2, 3]
    assert layout.sequence_offsets.tolist() == [0, 3, 5, 6, 7, 7]
    branches = layout.tree_rows.branches
    assert [t.tolist() for t in (branches.first, branches.extra, branches.position)] == [[1], [3], [0]]
    assert (layout.num_rows, layout.num_steps, layout.num_sequences, layout.shape) == (7, 6, 5, (1, 5))
    assert "tree of 4 rows" in repr(layout)


SAME = ("weights", "step_offsets", "step_of_row", "step_sequence", "sequence_offsets", "host_step_offsets")
SAME += ("host_step_sequence", "host_sequence_offsets")


@given(seed=st.integers(0, 10**6), weighted=st.booleans(), split=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tokens_are_those_of_the_sequences(seed, weighted, split):
    """What is of tokens and steps has the values of a padded batch of the same sequences."""
    batch = random_tree(seed, weighted=weighted, max_tokens=20 if split else None)
    for name in SAME:
        ours, theirs = getattr(batch.layout, name), getattr(batch.plain, name)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    for name in ("num_rows", "num_steps", "num_sequences", "max_label", "one_row_per_step"):
        assert getattr(batch.layout, name) == getattr(batch.plain, name), name


@given(seed=st.integers(0, 10**6), split=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_token_has_its_row(seed, split):
    """A token's row is at its parent and has its label; rows are distinct; each position names its first row."""
    batch = random_tree(seed, max_tokens=20 if split else None)
    layout, tree = batch.layout, batch.tree
    shared, branches = layout.tree_rows.shared, layout.tree_rows.branches
    row = torch.arange(layout.num_rows) if shared is None else shared.row
    places = layout.places
    length = tree.shape[1]
    parent = places // length * length + tree.parent.flatten()[places]
    assert torch.equal(layout.rows[row], parent) and (tree.parent.flatten()[places] >= 0).all()
    assert torch.equal(layout.labels[row], batch.plain.labels)
    assert torch.equal(places, batch.place.flatten()[batch.plain.places])
    pairs = list(zip(layout.rows.tolist(), layout.labels.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and set(row.tolist()) == set(range(len(pairs)))
    first = {}
    for n, (position, _) in enumerate(pairs):
        first.setdefault(position, n)
    assert layout.row_of.tolist() == [first.get(i, -1) for i in range(layout.row_of.shape[0])]
    extra = [n for n, (position, _) in enumerate(pairs) if first[position] != n]
    assert ([] if branches is None else branches.extra.tolist()) == extra
    if branches is not None:
        assert [layout.rows[branches.first[k]].item() for k in branches.position] == layout.rows[extra].tolist()


def test_nothing_shared_needs_no_table():
    """Sequences that share nothing they score are rows like any others: no gather, no sum."""
    tree, layout = layout_of([[1, 2, 3], [1, 4, 5]], [[-1, -1, 0], [-1, -1, 0]])
    assert tree.sharing > 1
    assert layout.tree_rows.shared is None and layout.tree_rows.branches is None and layout.rows.tolist() == [1, 3]


def test_a_label_of_its_own():
    """Sequences that share a token but not its label have two rows there."""
    _, layout = layout_of([[1, 2], [1, 2]], [[-1, 0], [-1, 0]], labels=[[-100, 2], [-100, 9]])
    assert (layout.rows.tolist(), layout.labels.tolist()) == ([0, 0], [2, 9])


def test_to_moves_the_table():
    layout = random_tree(0).layout
    there = layout.to("meta")
    moved = (there.tree_rows.places, there.tree_rows.shared.row, there.tree_rows.branches.extra)
    assert {t.device.type for t in moved} == {"meta"}
    assert there.tree_rows.shared.host_row is layout.tree_rows.shared.host_row
    again = pickle.loads(pickle.dumps(layout))
    assert torch.equal(again.tree_rows.shared.row, layout.tree_rows.shared.row)


def test_row_weights():
    """One a scored token, as everywhere; or on the grid, where sequences share them."""
    batch = random_tree(0)
    grid = torch.rand(batch.tree.shape) + 0.5
    on_grid = batch.layout.with_row_weights(grid).weights
    assert torch.equal(on_grid, batch.plain.with_row_weights(batch.unshared(grid)).weights)
    own = torch.rand(batch.layout.num_rows) + 0.5
    assert torch.equal(batch.layout.with_row_weights(own).weights, own)


def test_numpy_arrays():
    tokens = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])]
    ids = [torch.tensor([-1, 0, 0])] * 2
    tree = TokenTree.from_sequences(tokens)
    layout = StepLayout.from_tree(tree, [t.numpy() for t in tokens], [i.numpy() for i in ids])
    assert layout.labels.tolist() == StepLayout.from_tree(tree, tokens, ids).labels.tolist() == [2, 3, 4]


def test_no_sequences():
    layout = StepLayout.from_tree(TokenTree.from_sequences([]), [], [])
    assert (layout.num_rows, layout.num_steps, layout.num_sequences) == (0, 0, 0)
    assert step_pref_loss(torch.randn(*layout.shape, 5), layout, reference_free=True).loss == 0


T = torch.tensor
MESSAGES = [
    (dict(labels=T([[5, 6]])), TypeError, "labels: expected a list of 1-D tensors, one for each sequence, got"),
    (dict(labels=[T([5, 6])]), ValueError, "labels: expected 2 tensors, one for each sequence, got 1"),
    (dict(labels=[T([5]), T([5, 7])]), ValueError, r"labels\[0\]: expected shape \(2,\)"),
    (dict(labels=[T([5.0, 6]), T([5, 7])]), TypeError, r"labels\[0\]: expected"),
    (dict(labels=[[5, 6], T([5, 7])]), TypeError, r"labels\[0\]: expected"),
    (dict(step_ids=[T([0, 0]), T([0])]), ValueError, r"step_ids\[1\]: expected shape \(2,\)"),
    (dict(step_ids=[T([0, 0]), T([1, 0])]), ValueError, "step_ids: expected ids that never go back .* in sequence 1"),
    (dict(token_weights=[T([1, 1]), T([1.0, 1])]), TypeError, r"token_weights\[0\]: expected"),
    (dict(token_weights=[T([1, torch.inf]), T([1.0, 1])]), ValueError, "token_weights: expected finite"),
    (dict(vocab_size=7), ValueError, r"labels: expected values in \[0, 7\).*got 7 in sequence 1 at position 1"),
    (dict(labels=[T([5, -6]), T([5, 7])]), ValueError, "got -6 in sequence 0 at position 1"),
    (dict(ignore_index=1.5), TypeError, "ignore_index"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), MESSAGES)
def test_messages(options, error, message):
    tree = TokenTree.from_sequences([[5, 6], [5, 7]])
    given_ = {"labels": [T([5, 6]), T([5, 7])], "step_ids": [T([-1, 0])] * 2, **options}
    with pytest.raises(error, match=message):
        StepLayout.from_tree(tree, **given_)


def test_a_tree_is_named():
    with pytest.raises(TypeError, match="tree: expected a TokenTree, got"):
        StepLayout.from_tree(torch.zeros(2, 2), [], [])


def test_labels_and_logits_are_checked_as_elsewhere():
    tree, layout = layout_of(TOKENS, IDS)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\), got 9 in sequence 1 at position 2"):
        step_pref_loss(torch.randn(1, 5, 9), layout, reference_free=True)
    with pytest.raises(ValueError, match=r"logits: expected shape \(1, 5, 12\)|\(5, 12\)"):
        step_pref_loss(torch.randn(5, 4, 12), layout, reference_free=True)


def test_a_path_is_the_plain_batch():
    """One sequence a row and nothing shared: the rows, labels and table-free kernels of a padded batch."""
    g = torch.Generator().manual_seed(0)
    tokens = [torch.cat([T([b]), torch.randint(0, 9, (6,), generator=g)]) for b in range(3)]
    ids = [torch.tensor([-1, 0, 0, 1, 1, 2, 2])] * 3
    tree = TokenTree.from_sequences(tokens, max_tokens=7)
    layout, plain = StepLayout.from_tree(tree, tokens, ids), StepLayout.from_step_ids(pad(tokens, -100), pad(ids, -1))
    assert layout.shape == plain.shape and layout.tree_rows.shared is None
    for name in ("rows", "labels", "row_of", "step_offsets", "places"):
        assert torch.equal(getattr(layout, name), getattr(plain, name)), name
