# SPDX-License-Identifier: Apache-2.0
"""The part of a layout at some positions, by hand.

Mutations tried (what was broken -> which tests went red):
    a label is with its own position            -> both tests of parts
    offsets of sequences are those of the whole -> a label is with the position before it
"""

import pytest
import torch

from sspo_ext import LayoutPart, StepLayout, step_logps
from sspo_ext.tree import TokenTree

LABELS = torch.tensor([[9, 5, 6, 7, 8, 4], [9, 5, 3, 2, 1, 0]])
STEPS = torch.tensor([[-1, 0, 0, 1, 1, 2], [-1, -1, 0, 0, 0, 1]])
LAYOUT = StepLayout.from_step_ids(LABELS, STEPS, token_weights=torch.arange(1.0, 13).view(2, 6))


def test_a_label_is_with_the_position_before_it():
    part = LayoutPart.from_positions(LAYOUT, [0, 1, 5])
    # of sequence 0 the tokens at 1 and 2; of sequence 1 that at 2, whose row is 1
    assert part.rows.tolist() == [0, 1, 5]
    own = part.layout
    assert own.shape == (2, 3) and own.num_sequences == 2
    assert own.rows.tolist() == [0, 1, 4]
    assert own.labels.tolist() == [5, 6, 3] and own.weights.tolist() == [2, 3, 9]
    assert own.num_steps == LAYOUT.num_steps == 5
    assert own.counts.tolist() == [2, 0, 0, 1, 0]
    assert own.step_of_row.tolist() == [0, 0, 3]
    assert own.sequence_offsets.tolist() == own.host_sequence_offsets.tolist() == [0, 2, 3]
    assert own.row_of.tolist() == [0, 1, -1, -1, 2, -1]
    assert own.host_step_offsets.tolist() == own.step_offsets.tolist() == [0, 2, 2, 2, 3, 3]
    assert not own.one_row_per_step


def test_packed_rows_and_all_positions():
    packed = StepLayout.from_offsets(LABELS[0], torch.tensor([0, 4, 6]), torch.tensor([[1, 4], [4, 6]]))
    part = LayoutPart.from_positions(packed, torch.tensor([2, 4]))
    assert part.layout.rows.tolist() == [0, 1] and part.layout.labels.tolist() == [7, 4]
    assert part.layout.shape == (1, 2) and part.layout.num_sequences == 2
    everything = LayoutPart.from_positions(LAYOUT, range(6)).layout
    for name in ("rows", "labels", "weights", "step_offsets", "step_of_row", "sequence_offsets", "row_of"):
        assert torch.equal(getattr(everything, name), getattr(LAYOUT, name)), name
    assert LayoutPart.from_positions(LAYOUT, []).layout.num_rows == 0


@pytest.mark.parametrize("cut", ([0, 1, 5], [0, 1, 2], [3, 4], []))
def test_a_part_keeps_the_kept_tokens_of_its_rows(cut):
    """Log-probs among the tokens that sampling kept, of a part and of the whole."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 12, generator=g)
    others = [torch.randperm(12, generator=g)[: 1 + i % 4].tolist() for i in range(LAYOUT.num_rows)]
    sets = [{int(label), *more} for label, more in zip(LAYOUT.labels, others, strict=True)]
    narrow = LAYOUT.with_kept_tokens([sorted(one) for one in sets])
    whole, plain = step_logps(logits, narrow).tokens, step_logps(logits, LAYOUT).tokens
    part = LayoutPart.from_positions(narrow, cut)
    torch.testing.assert_close(step_logps(logits[:, cut], part.layout).tokens, whole[part.rows])
    assert not torch.allclose(whole, plain)


def test_what_cannot_be_cut_is_refused():
    for wrong in ([1, 1], [2, 1], [-1, 2], [3, 6]):
        with pytest.raises(ValueError, match=r"positions: expected ascending columns in \[0, 6\), got"):
            LayoutPart.from_positions(LAYOUT, wrong)
    with pytest.raises(TypeError, match="positions"):
        LayoutPart.from_positions(LAYOUT, torch.tensor([0.5]))
    with pytest.raises(TypeError, match="layout: expected a StepLayout"):
        LayoutPart.from_positions(LABELS, [0])
    ids = [torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8])]
    tree = StepLayout.from_tree(TokenTree.from_sequences(ids), ids, [torch.tensor([-1, -1, 0])] * 2)
    with pytest.raises(ValueError, match="layout: expected padded or packed rows, got a tree"):
        LayoutPart.from_positions(tree, [0])
    with pytest.raises(ValueError, match="layout: expected one with labels"):
        LayoutPart.from_positions(StepLayout.from_response(torch.ones(1, 3)), [0])
