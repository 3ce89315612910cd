# SPDX-License-Identifier: Apache-2.0
"""Attention of a tree in tiles: what a token does not see is not computed. For CPUs, by SDPA on parts of a row.

A run is tokens that follow each other on a path and in the row. Its queries see the keys of the path before it, all of
them, and its own causally. So a tile is one SDPA of a run's queries with the keys of its path, which are segments of
the row: parts between the places where the tree branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout.tree import PADDING, TokenTree

TILED = "sspo_tree"  # its name among transformers' attentions


@dataclass(frozen=True, eq=False)
class Tile:
    """The queries of one run, and the segments of its row that hold its keys."""

    queries: int
    before: int  # keys of the path before the run
    segments: list[int]

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(queries, keys), to be added; None for a causal one."""
        if not self.before and (window is None or window >= self.queries):
            return None
        distance = torch.arange(self.queries, device=device)[:, None] + self.before
        distance = distance - torch.arange(self.before + self.queries, device=device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a tree: its tiles fill it from the left, then comes padding."""

    tiles: list[Tile]
    segments: list[int]  # sizes, with the padding's
    runs: list[int]  # likewise


@dataclass(eq=False)
class Tiles:
    """What a layer's attention needs of a tree, for one window."""

    rows: list[Row]
    window: int | None
    masks: dict[tuple, list[list[Tensor | None]]] = field(default_factory=dict)

    def masks_for(self, dtype: torch.dtype, device: torch.device) -> list[list[Tensor | None]]:
        """The tiles' masks, made once for all layers."""
        key = (dtype, device)
        if key not in self.masks:
            self.masks[key] = [[tile.mask(self.window, dtype, device) for tile in row.tiles] for row in self.rows]
        return self.masks[key]


def tile_mask(tree: TokenTree, window: int | None) -> Tensor:
    """The tiles of a tree as a model's `attention_mask`: an empty 4-D tensor that carries them to the attention."""
    mask = torch.empty((tree.shape[0], 1, tree.shape[1], 0), dtype=torch.bool, device=tree.device)
    mask.sspo_tiles = Tiles([_row(parent) for parent in tree.parent.cpu().numpy()], window)  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def _row(parent: np.ndarray) -> Row:
    """The tiles of one row from each token's parent, a column."""
    size = int((parent != PADDING).sum())
    parent, column = parent[:size].astype(np.int64), np.arange(size)
    jumps = parent != column - 1
    jumps[:1] = True
    # a segment also begins behind every token that another run continues
    cuts = jumps.copy()
    behind = parent[jumps] + 1
    cuts[behind[(behind > 0) & (behind < size)]] = True
    starts, runs = np.flatnonzero(cuts), np.flatnonzero(jumps)
    segment_of = np.cumsum(cuts) - 1
    ends, run_ends = np.append(starts[1:], size), np.append(runs[1:], size)
    paths: list[list[int]] = []  # of each segment: itself and what is before it
    for s, start in enumerate(starts.tolist()):
        above = int(parent[start])
        paths.append([*(paths[segment_of[above]] if above >= 0 else []), s])
    lengths = (ends - starts).tolist()
    tiles = []
    for start, end in zip(runs.tolist(), run_ends.tolist(), strict=True):
        path = paths[segment_of[start]][:-1]
        own = range(int(segment_of[start]), int(segment_of[end - 1]) + 1)
        tiles.append(Tile(end - start, sum(lengths[s] for s in path), [*path, *own]))
    return Row(tiles, lengths, (run_ends - runs).tolist())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (R, heads, L, D), key and value (R, kv heads, L, D).

    A batch that is no tree goes to SDPA.
    """
    tiles: Tiles | None = getattr(attention_mask, "sspo_tiles", None)
    if tiles is None:  # no tree
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError(f"softcap: expected None with attention {TILED!r}; use 'eager' or 'flex_attention'")
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    masks, found = tiles.masks_for(query.dtype, query.device), []
    for row, of_row, q, k, v in zip(tiles.rows, masks, query.split(1), key.split(1), value.split(1), strict=True):
        padding = length - sum(row.runs)
        queries = q.split([*row.runs, padding], 2)
        keys, values = (x.split([*row.segments, padding], 2) for x in (k, v))
        parts = []
        for tile, mask, some in zip(row.tiles, of_row, queries, strict=False):
            seen, held = (torch.cat([x[s] for s in tile.segments], 2) for x in (keys, values))
            parts.append(
                F.scaled_dot_product_attention(
                    some, seen, held, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
                )
            )
        # 0 for padding, which is read by nobody
        found.append(torch.cat([*parts, 0 * queries[-1]], 2) if padding else torch.cat(parts, 2))
    return torch.cat(found).transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes the attention known to transformers, with SDPA's masks for batches that are no trees."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(TILED, attend)
    AttentionMaskInterface.register(TILED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
