# SPDX-License-Identifier: Apache-2.0
"""The masks of a tree: each form lets a token see its own path, or the last part of it, and nothing else.

Mutations of sspo_ext/tree/masks.py, each caught by the test named:
  `high > first_query` as `>=`; `low >= first_query + _BLOCK` as `>`   test_block_mask_has_torchs_blocks
  `low >= first_query + _BLOCK` as `low > first_query`                 test_block_mask_sees_the_path
  `some &=` with low and high of the positions exchanged               test_block_mask_sees_the_path
  `whole &=` left out                                                  test_block_mask_sees_the_path
  a dense mask in block_mask                                           test_block_mask_is_never_of_total_length_squared
"""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
from benchmarks.models import families
from sspo_ext.layout.tree import PADDING, TokenTree
from sspo_ext.tree.masks import block_mask, seen_keys, tree_mask

BLOCK = 128


def made_up_tree(seed, max_tokens=None, prefix=(0, 100, 250)):
    """Trees of up to hundreds of tokens: a chain that branches, and branches of every length."""
    r = random.Random(seed)
    trunk = [r.randrange(90) for _ in range(300)]
    sequences = [trunk[: r.choice(prefix)] + [r.randrange(90) for _ in range(r.randrange(1, 200))] for _ in range(12)]
    return TokenTree.from_sequences(sequences, groups=[r.randrange(2) for _ in range(12)], max_tokens=max_tokens)


def by_hand(tree, window=None):
    """(R, L, L) bool from the parents alone."""
    rows, length = tree.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for r, parents in enumerate(tree.parent.tolist()):
        for query, parent in enumerate(parents):
            seen[r, query, query] = True
            if parent >= 0:
                seen[r, query] |= seen[r, parent]
    if window is not None:
        depth = tree.position_ids
        seen &= depth[:, :, None] - depth[:, None, :] < window
    return seen


def spelt_out(mask):
    """The (R, L, L) bool mask that FlexAttention computes from a BlockMask: full blocks, and mask_mod in the others."""
    rows, _, length, _ = mask.shape
    blocks = mask.kv_indices.shape[-1]
    index = torch.arange(blocks * BLOCK)
    seen = torch.zeros(rows, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    for r in range(rows):
        for i in range(blocks):
            queries = index[i * BLOCK : (i + 1) * BLOCK]
            lists = (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            )
            for number, indices, whole in lists:
                for j in indices[r, 0, i, : number[r, 0, i]].tolist():
                    keys = index[j * BLOCK : (j + 1) * BLOCK]
                    block = torch.tensor(True) if whole else mask.mask_mod(r, 0, queries[:, None], keys)
                    assert not seen[r, queries[0], keys].any()
                    seen[r, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = block
    return seen[:, :length, :length]


def whole_blocks():
    """Chains of two blocks and of three: a block of queries ends where the tree ends."""
    return TokenTree.from_sequences([range(2 * BLOCK), range(1000, 1000 + 3 * BLOCK)])


TREES = [(0, None), (1, 500), (2, 512), (3, 900)]


@pytest.mark.parametrize("window", (None, 1, 40, 200))
@pytest.mark.parametrize(("seed", "max_tokens"), TREES)
def test_dense_mask_sees_the_path(seed, max_tokens, window):
    tree = made_up_tree(seed, max_tokens)
    assert torch.equal(seen_keys(tree, window), by_hand(tree, window))


@pytest.mark.parametrize("window", (None, 1, 40, 200))
@pytest.mark.parametrize(("seed", "max_tokens"), TREES)
def test_block_mask_sees_the_path(seed, max_tokens, window):
    tree = made_up_tree(seed, max_tokens)
    mask = block_mask(tree, window)
    assert mask.shape == (tree.shape[0], 1, tree.shape[1], tree.shape[1])
    assert torch.equal(spelt_out(mask), by_hand(tree, window))


@pytest.mark.parametrize(("seed", "max_tokens"), [*TREES, (None, None)])
def test_block_mask_has_torchs_blocks(seed, max_tokens):
    """No block more than torch finds in the dense mask, none in part that is full, and the same for the gradients."""
    tree = whole_blocks() if seed is None else made_up_tree(seed, max_tokens)
    got, (rows, length) = block_mask(tree), tree.shape
    expected = create_block_mask(got.mask_mod, rows, None, length, length, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(got, f"{name}_num_blocks")
        assert torch.equal(numbers, getattr(expected, f"{name}_num_blocks")), name
        indices, others = getattr(got, f"{name}_indices"), getattr(expected, f"{name}_indices")
        chosen = torch.arange(indices.shape[-1]) < numbers[..., None]
        assert torch.equal(indices[chosen], others[chosen]), name


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("window", (None, 100))
def test_block_mask_is_never_of_total_length_squared(window):
    tree = TokenTree.from_sequences([[1] * 100 + [n] * 64 for n in range(250)])
    length, blocks = tree.shape[1], -(-tree.shape[1] // BLOCK)
    assert length > 16000
    with Largest() as largest:
        block_mask(tree, window)
    assert largest.elements <= max(blocks * (blocks + 1), blocks * BLOCK)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_padding_sees_itself(attention, dtype):
    """So no softmax is over nothing: no position's logits are NaN, nor is a gradient."""
    model = families.build("llama", dtype)
    model.set_attn_implementation(attention)
    tree = TokenTree.from_sequences([[5, 6, 7, 8], [9]], pad_to_multiple_of=8)
    assert (tree.parent == PADDING).sum() == 11
    inputs = {"position_ids": tree.position_ids, "attention_mask": tree_mask(model, tree)}
    logits = model(input_ids=tree.input_ids, **inputs).logits
    logits.float().square().sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
