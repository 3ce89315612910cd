# SPDX-License-Identifier: Apache-2.0
"""The attention mask of a tree, in the form that a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hf.wrappers import model_dtype, text_config
from ..layout.tree import TokenTree
from .tiles import TILED, tile_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FULL, SLIDING = "full_attention", "sliding_attention"

# What replaces the model's own mask. SDPA takes a bool mask (True: seen), eager attention adds a float mask.
SDPA, EAGER, FLEX = "sdpa", "eager", "flex_attention"

_BLOCK = 128  # FlexAttention's own size of a block


def tree_mask(model: nn.Module, tree: TokenTree) -> Any:
    """Make the model's `attention_mask` argument: a 4-D tensor or a BlockMask, or one for each kind of layer.

    It replaces the model's sliding window too. So the window, counted along a path, becomes part of the mask.
    """
    config = text_config(model)
    window = window_of(config)

    def form(window: int | None) -> Tensor | BlockMask:
        if attention_of(config) == FLEX:
            return block_mask(tree, window)
        if attention_of(config) == TILED:
            return tile_mask(tree, window)
        seen = seen_keys(tree, window)[:, None]
        if attention_of(config) == SDPA:
            return seen
        dtype = model_dtype(model)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    if window is None or getattr(config, "layer_types", None) is None:
        return form(window)
    return {FULL: form(None), SLIDING: form(window)}


def seen_keys(tree: TokenTree, window: int | None = None) -> Tensor:
    """(R, L, L) bool: which key (last) a query (second) sees."""
    column = torch.arange(tree.shape[1], device=tree.device)
    query, position = column[:, None], tree.position_ids
    seen = (column <= query) & (query < tree.end[:, None, :])
    return seen if window is None else seen & (position[:, :, None] - position[:, None, :] < window)


def block_mask(tree: TokenTree, window: int | None = None) -> BlockMask:
    """The same for FlexAttention, made from blocks of 128 positions without an (L, L) tensor.

    Later keys are never seen. An earlier block of keys is seen whole if each of its subtrees ends behind the queries,
    and not at all if each ends before them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = tree.shape
    blocks = -(-length // _BLOCK)
    more = (0, blocks * _BLOCK - length)
    end, position = F.pad(tree.end, more), F.pad(tree.position_ids, more)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end[row, key])
        return seen if window is None else seen & (position[row, query] - position[row, key] < window)

    first_query = torch.arange(0, blocks * _BLOCK, _BLOCK, device=tree.device)[:, None]  # (blocks, 1)
    earlier = first_query > first_query.T
    low, high = (f(end.view(rows, blocks, _BLOCK), -1)[:, None, :] for f in (torch.amin, torch.amax))
    some = earlier & (high > first_query)
    whole = earlier & (low >= first_query + _BLOCK)
    if window is not None:
        low, high = (f(position.view(rows, blocks, _BLOCK), -1) for f in (torch.amin, torch.amax))
        some &= low[:, :, None] - high[:, None, :] < window
        whole &= high[:, :, None] - low[:, None, :] < window
    some |= torch.eye(blocks, dtype=torch.bool, device=tree.device)
    kv_num_blocks, kv_indices = _listed(some & ~whole)
    full_kv_num_blocks, full_kv_indices = _listed(some & whole)
    return BlockMask.from_kv_blocks(
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices,
        BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length),
    )  # fmt: skip


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and their numbers, the chosen ones first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def attention_of(config: Any) -> str | None:
    """Return the name of the attention implementation: "sdpa", "eager", ..."""
    return getattr(config, "_attn_implementation", None)


def window_of(config: Any) -> int | None:
    """Return the sliding window in tokens; None for a model without one."""
    if set(getattr(config, "layer_types", None) or ()) == {FULL}:
        return None
    found = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return next((w for w in found if isinstance(w, int) and w > 0), None)


def is_beyond(config: Any, longest: int) -> bool:
    """Tell whether a path of `longest` tokens is longer than the model's sliding window."""
    window = window_of(config)
    return window is not None and longest > window
