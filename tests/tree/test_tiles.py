# SPDX-License-Identifier: Apache-2.0
"""Attention in tiles: which queries and keys meet is the mask of the tree, and nothing else is computed.

Broken on purpose, and red here: a run's own keys left out; segments not cut where the tree branches; the window counted
from the run's start instead of the path's.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from sspo_ext.layout.tree import PADDING, TokenTree
from sspo_ext.tree.masks import seen_keys
from sspo_ext.tree.tiles import TILED, attend, tile_mask

SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=9)


def spelt(tree, window):
    """(R, L, L): which key each query meets, read from the tiles."""
    rows, length = tree.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for r, row in enumerate(tile_mask(tree, window).sspo_tiles.rows):
        segments = torch.arange(sum(row.segments)).split(row.segments)
        runs = torch.arange(sum(row.runs)).split(row.runs)
        for tile, queries in zip(row.tiles, runs, strict=True):
            keys = torch.cat([segments[s] for s in tile.segments])
            mask = tile.mask(window, torch.float32, torch.device("cpu"))
            if mask is None:
                assert len(keys) == len(queries)
                mask = torch.zeros(len(queries), len(keys)).masked_fill(
                    torch.ones(len(queries), len(keys)).triu(1).bool(), -torch.inf
                )
            seen[r][queries[:, None], keys] = mask == 0
    return seen


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.sampled_from([None, 1, 3, 6]), st.sampled_from([None, 9, 14]))
def test_the_tiles_spell_the_mask(sequences, window, max_tokens):
    tree = TokenTree.from_sequences(sequences, max_tokens=max_tokens)
    real = tree.parent != PADDING
    wanted = seen_keys(tree, window) & real[:, :, None]  # padding sees itself there, and nothing here
    assert torch.equal(spelt(tree, window), wanted)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_sdpa_with_the_mask(window, groups):
    """Outputs and gradients in float64, with grouped keys, two rows and padding, which is 0 and gets no gradient."""
    tree = TokenTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [1, 2, 7, 8], [9, 9]], max_tokens=9)
    assert tree.shape[0] == 2 and (tree.parent == PADDING).any()
    torch.manual_seed(0)
    rows, length = tree.shape
    q = torch.randn(rows, 6, length, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(rows, 6 // groups, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    real = (tree.parent != PADDING)[:, None, :, None]
    wide = [x.repeat_interleave(groups, 1) for x in (k, v)]
    mask = seen_keys(tree, window)[:, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=0.3) * real
    got, _ = attend(torch.nn.Identity(), q, k, v, tile_mask(tree, window), scaling=0.3)
    got = got.transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    for mine, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), (q, k, v), retain_graph=True) for out in (got, wanted)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_group_computes_its_pairs_and_no_more():
    """Eight branches of 100 behind 50: 50 causally, then each branch with the prompt and itself."""
    tree = TokenTree.from_sequences([[*range(1, 51), *([100 + b] * 100)] for b in range(8)])
    (row,) = tile_mask(tree, None).sspo_tiles.rows
    assert [(t.queries, t.before) for t in row.tiles] == [(150, 0), *[(100, 50)] * 7]
    assert row.segments == [50, *[100] * 8]


def test_a_batch_that_is_no_tree_is_sdpa():
    from benchmarks.models import families
    from sspo_ext.tree import tree_attention

    model = families.build("llama")
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
        with tree_attention(model, TILED):
            got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(got, wanted)


def test_a_softcap_is_refused():
    tree = TokenTree.from_sequences([[1, 2]])
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="softcap: expected None"):
        attend(torch.nn.Identity(), x, x, x, tile_mask(tree, None), softcap=30.0)
