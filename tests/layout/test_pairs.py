# SPDX-License-Identifier: Apache-2.0
"""StepPairs: by index, explicit, what launch 2 reads of them, units, and the messages.

Mutations of sspo_ext/pairs.py and StepLayout.pair_by_index, each caught by the test named (on a copy of the package):
  by index: pair with the neighbouring sequence  test_by_index_golden
  by index: keep unmatched steps                 test_by_index_golden
  adjacency unsorted                             test_explicit_fields
  adjacency: winner and loser codes swapped      test_explicit_fields
  a pair with one empty step is valid            test_pairs_with_an_empty_step_are_dropped
  None clears stored values                      test_values
  values carry gradient                          test_values
  units: union without root                      test_units_are_connected_components
"""
# ruff: noqa: E501 (tables of calls and their messages)

import pickle

import pytest
import torch
from helpers.batch import pack, random_batch, random_pairs

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout


def ragged(*step_counts, length=8):
    """A layout whose sequences have these numbers of one-token steps."""
    ids = torch.full((len(step_counts), length), -1)
    for b, n in enumerate(step_counts):
        ids[b, 1 : 1 + n] = torch.arange(n)
    return StepLayout.from_step_ids(torch.ones_like(ids), ids)


def test_by_index_golden():
    # sequences 0, 1 chosen; 2, 3 rejected. Steps: 0 1 2 | 3 | 4 5 | 6 7 8
    layout = ragged(3, 1, 2, 3)
    assert layout.pair_by_index().index.tolist() == [[0, 4], [1, 5], [3, 6]]
    assert ragged(2, 0).pair_by_index().index.shape == (0, 2)
    assert ragged().pair_by_index().num_pairs == 0


def test_by_index_of_a_packed_batch_is_the_same():
    batch = random_batch(2, B=6)
    assert torch.equal(batch.layout.pair_by_index().index, pack(batch)[1].pair_by_index().index)


def test_explicit_fields():
    layout = ragged(2, 2)  # steps 0 1 | 2 3
    pairs = StepPairs.from_index(layout, torch.tensor([[0, 2], [1, 0], [0, 3]]))
    assert pairs.index.dtype == torch.int32 and pairs.index.tolist() == [[0, 2], [1, 0], [0, 3]]
    assert pairs.adj_offsets.tolist() == [0, 3, 4, 5, 6]
    # step 0 wins pair 0 (code 0), loses pair 1 (code 3), wins pair 2 (code 4); step 1 wins pair 1; 2 and 3 lose
    assert pairs.adj_pairs.tolist() == [0, 3, 4, 2, 1, 5]
    assert pairs.valid.tolist() == [True] * 3 and (pairs.num_valid, pairs.num_dropped) == (3, 0)
    assert "pairs=3" in repr(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_adjacency_lists_each_pair_once_from_each_side(seed):
    layout = random_batch(seed).layout
    pairs = random_pairs(layout, seed)
    seen = []
    for step in range(layout.num_steps):
        mine = pairs.adj_pairs[pairs.adj_offsets[step] : pairs.adj_offsets[step + 1]].tolist()
        assert mine == sorted(mine), "ascending within a step: the order of summation is fixed"
        for code in mine:
            assert int(pairs.index[code // 2, code % 2]) == step
        seen += mine
    assert sorted(seen) == list(range(2 * pairs.num_pairs))


def test_index_from_lists_arrays_and_any_integer():
    layout = ragged(2, 2)
    want = [[0, 2], [1, 3]]
    for index in (want, torch.tensor(want, dtype=torch.int32), torch.tensor(want).numpy()):
        assert StepPairs.from_index(layout, index).index.tolist() == want
    assert StepPairs.from_index(layout, []).num_pairs == 0


def test_pairs_with_an_empty_step_are_dropped():
    ids = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2]])  # sequence 0 has no token in step 1
    layout = StepLayout.from_step_ids(torch.ones_like(ids), ids)
    pairs = layout.pair_by_index()
    assert pairs.index.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert pairs.valid.tolist() == [True, False, True]
    assert (pairs.num_pairs, pairs.num_valid, pairs.num_dropped) == (3, 2, 1)


def test_values():
    layout = ragged(2, 2)
    index = [[0, 2], [1, 3]]
    pairs = StepPairs.from_index(
        layout,
        index,
        weights=torch.tensor([1.0, 2]),
        margins=torch.tensor([0.0, 0.5]),
        soft_labels=torch.tensor([1.0, 0.7]),
    )
    again = pairs.with_values(weights=torch.tensor([3.0, 4]))
    assert again.weights.tolist() == [3, 4] and pairs.weights.tolist() == [1, 2]
    assert torch.equal(again.margins, pairs.margins) and torch.equal(again.soft_labels, pairs.soft_labels)
    assert StepPairs.from_index(layout, index).weights is None
    grad = torch.ones(2, requires_grad=True)
    assert not pairs.with_values(weights=grad).weights.requires_grad, "values are constants"


def test_to_and_pickle():
    pairs = random_pairs(random_batch(0).layout, 0, weights=None)
    moved = pairs.to("meta")
    for name in ("index", "adj_offsets", "adj_pairs", "valid"):
        assert getattr(moved, name).device.type == "meta"
        assert torch.equal(getattr(pickle.loads(pickle.dumps(pairs)), name), getattr(pairs, name))
    assert torch.equal(moved.host_index, pairs.host_index)


def test_units():
    layout = ragged(3, 1, 2, 3)  # steps 0 1 2 | 3 | 4 5 | 6 7 8
    pairs = StepPairs.from_index(layout, [[0, 4], [4, 7], [1, 6], [5, 8]])
    assert list(pairs.units()) == [0, 1, -1, -1, 0, 5, 1, 0, 5]


@pytest.mark.parametrize("seed", range(4))
def test_units_are_connected_components(seed):
    layout = random_batch(seed, B=6, T=16).layout
    pairs = random_pairs(layout, seed, P=layout.num_steps // 2)
    reach = torch.eye(layout.num_steps, dtype=torch.bool)
    for a, b in pairs.index.tolist():
        reach[a, b] = reach[b, a] = True
    for k in range(layout.num_steps):
        reach |= reach[:, k : k + 1] & reach[k : k + 1, :]
    units = torch.as_tensor(pairs.units())
    used = torch.zeros(layout.num_steps, dtype=torch.bool)
    used[pairs.index.long().reshape(-1)] = True
    assert torch.equal(units >= 0, used)
    both = used[:, None] & used[None, :]
    assert torch.equal((units[:, None] == units[None, :])[both], reach[both])


@pytest.mark.parametrize(
    ("index", "values", "error", "match"),
    [
        ([[0.5, 1.0]], {}, TypeError, "pairs: expected an integer tensor"),
        ([0, 1], {}, ValueError, "pairs: expected 2 dimensions"),
        ([[0, 1, 2]], {}, ValueError, r"pairs: expected shape \(1, 2\)"),
        ([[0, 2], [1, 4]], {}, ValueError, r"pairs: expected step indices in \[0, 4\), got 4 in pair 1"),
        ([[0, -1]], {}, ValueError, r"pairs: expected step indices in \[0, 4\), got -1 in pair 0"),
        ([[0, 2], [3, 3]], {}, ValueError, "pairs: expected two different steps, got step 3 twice in pair 1"),
        ([[0, 2]], {"weights": torch.ones(2)}, ValueError, r"weights: expected shape \(1,\)"),
        ([[0, 2]], {"margins": torch.ones(1, 1)}, ValueError, r"margins: expected shape \(1,\)"),
        ([[0, 2]], {"weights": torch.ones(1).long()}, TypeError, "weights: expected a tensor of float32"),
        ([[0, 2]], {"weights": [1.0]}, TypeError, r"weights: expected a torch.Tensor, got \[1.0\] \(list\)"),
        ([[0, 2]], {"soft_labels": torch.tensor([1.5])}, ValueError, r"soft_labels: expected probabilities in \[0, 1\], got 1.5"),
        ([[0, 2]], {"soft_labels": torch.tensor([float("nan")])}, ValueError, "soft_labels: expected probabilities"),
    ],
)  # fmt: skip
def test_messages(index, values, error, match):
    with pytest.raises(error, match=match):
        StepPairs.from_index(ragged(2, 2), index, **values)


def test_an_odd_number_of_sequences_cannot_be_paired_by_index():
    with pytest.raises(ValueError, match="pairs: expected an even number of sequences.*got 3"):
        ragged(1, 1, 1).pair_by_index()
