# SPDX-License-Identifier: Apache-2.0
"""Batches of the collator, padded and packed.

Mutations, each caught by the test named:
  pairs of the collator not offset by the rejected rows           test_padded_and_packed_agree
  reference sums in the features' order, not the layout's         test_reference_sums_follow_the_layout
"""

import pytest
import torch
from helpers.pair_rows import row, steps_of

from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.data.tokenize import tokenize_rows


def features(tok, **options):
    rows = [
        row("a\nb\nc", "a\nx\nlonger line\nd", weight=2.0),
        row("5 + 5 = 10\nA: 10", "5 + 5 = 11\nA: 11", margin=0.5),
        row("😀\n\nb", "a", prompt="A longer prompt:\n"),
    ]
    return tokenize_rows(rows, tok, skip_shared=False, **options)


def scored(batch):
    """Text-free view of a batch: for every step its labels and the ids of all positions that predict them."""
    layout = batch["layout"]
    ids = batch["input_ids"].reshape(-1)
    offsets = layout.step_offsets.tolist()
    return [
        (layout.labels[a:b].tolist(), ids[layout.rows[a:b]].tolist())
        for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("pair_by", ["index", "branch", "sequence"])
def test_padded_and_packed_agree(tok, pair_by):
    rows = features(tok, pair_by=pair_by)
    padded = StepPreferenceCollator(tok.pad_token_id)(rows)
    packed = StepPreferenceCollator(tok.pad_token_id, packed=True)(rows)
    assert set(padded) == {"input_ids", "attention_mask", "layout", "pairs"}
    assert set(packed) == {"input_ids", "position_ids", "layout", "pairs"}
    assert scored(padded) == scored(packed)
    assert torch.equal(padded["pairs"].index, packed["pairs"].index)
    assert torch.equal(padded["layout"].step_sequence, packed["layout"].step_sequence)
    lengths = [len(f[f"{side}_input_ids"]) for side in ("chosen", "rejected") for f in rows]
    assert padded["attention_mask"].sum(1).tolist() == lengths and packed["input_ids"].shape == (1, sum(lengths))
    assert packed["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
    assert (padded["input_ids"][padded["attention_mask"] == 0] == tok.pad_token_id).all()

    texts = [tok.decode(labels) for labels, _ in scored(padded)]
    pairs = [(texts[winner], texts[loser]) for winner, loser in padded["pairs"].index.tolist()]
    expected = [
        (c, r)
        for f in rows
        for k, j in f["pairs"]
        for c, r in [(steps_of(f, "chosen", tok)[k], steps_of(f, "rejected", tok)[j])]
    ]
    assert pairs == expected
    if pair_by == "index":
        assert ("b\n", "x\n") in pairs and len(texts) == 3 + 2 + 1 + 3 + 2 + 1
    counts = [len(f["pairs"]) for f in rows]
    weights, margins = padded["pairs"].weights, padded["pairs"].margins
    assert weights.tolist() == [2.0] * counts[0] + [1.0] * (counts[1] + counts[2])
    assert margins.tolist() == [0.0] * counts[0] + [0.5] * counts[1] + [0.0] * counts[2]


def test_loss_of_padded_and_packed_is_the_same(tok):
    from sspo_ext.losses.pref import step_pref_loss

    rows = features(tok)
    table = torch.randn(len(tok), len(tok), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = []
    for packed in (False, True):
        batch = StepPreferenceCollator(tok.pad_token_id, packed=packed, pad_to_multiple_of=8)(rows)
        assert packed or batch["input_ids"].shape[1] % 8 == 0
        logits = table[batch["input_ids"]]  # a model that looks at one token
        out.append(step_pref_loss(logits, batch["layout"], batch["pairs"], backend="reference"))
    torch.testing.assert_close(out[0].loss, out[1].loss)
    torch.testing.assert_close(out[0].step_logps, out[1].step_logps)


def test_reference_sums_follow_the_layout(tok):
    rows = features(tok)
    for i, f in enumerate(rows):
        for j, side in enumerate(("chosen", "rejected")):
            f[f"ref_{side}"] = [100.0 * j + 10 * i + k for k in range(max(f[f"{side}_step_ids"]) + 1)]
    batch = StepPreferenceCollator(tok.pad_token_id)(rows)
    expected = [100 * (s // 3) + 10 * (s % 3) for s in batch["layout"].step_sequence.tolist()]
    assert (batch["ref"] // 10 * 10).tolist() == expected and batch["ref"].dtype == torch.float32
    assert batch["ref"].shape == (batch["layout"].num_steps,)
    rows[1]["ref_rejected"] = [0.0]
    with pytest.raises(ValueError, match="^ref: expected 2 step sums for row 0, got shape"):
        StepPreferenceCollator(tok.pad_token_id)(rows)


def test_collator_errors_and_defaults(tok):
    with pytest.raises(ValueError, match="^features: "):
        StepPreferenceCollator(0)([])
    with pytest.raises(ValueError, match=r"^input_ids: expected tokens in \[0, 5\), got 201 in row 0"):
        StepPreferenceCollator(0, vocab_size=5)(features(tok))
    plain = StepPreferenceCollator(tok.pad_token_id)(tokenize_rows([row()], tok))
    assert plain["pairs"].weights is None and plain["pairs"].margins is None and "ref" not in plain
