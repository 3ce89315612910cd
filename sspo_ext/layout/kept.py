# SPDX-License-Identifier: Apache-2.0
"""The tokens among which a scored token was drawn, where sampling by top-p or top-k left some of the vocabulary out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import describe
from .bundle import TensorBundle
from .tree_rows import TreeRows


@dataclass(frozen=True, eq=False, repr=False)
class KeptTokens(TensorBundle):
    """For each of U rows the tokens that its distribution is over."""

    token_ids: Tensor  # (M,) int64
    row: Tensor  # (M,) int64, ascending
    host_counts: Tensor  # (U,) int64; 0: the whole vocabulary
    largest: int  # of the token ids; -1 where there are none

    def of_rows(self, rows: np.ndarray) -> KeptTokens:
        """Of some rows alone, which are numbered from 0."""
        counts = self.host_counts.numpy()
        ends = np.cumsum(counts)
        index = torch.from_numpy(_ranges((ends - counts)[rows], counts[rows]))
        return _on(self.token_ids, index, counts[rows], self.largest)

    def check_vocab(self, vocab: int) -> None:
        """Raises if a token is not below `vocab`."""
        if self.largest >= vocab:
            raise ValueError(f"kept: expected token ids below {vocab}, got {self.largest}")


def kept_tokens(kept: Sequence, labels: Tensor, rows: Tensor, tree: TreeRows | None) -> KeptTokens:
    """The table from one list of tokens for each scored token.

    Where several tokens are drawn at one position (of a tree), that position's set is the union of theirs.

    Args:
        kept: N times None, or the ids of the kept tokens.
        labels: (U,) of the rows.
        rows: (U,) the position of each row.
        tree: which row each scored token has.
    """
    shared = None if tree is None else tree.shared
    position = rows.cpu().numpy() if tree is None else tree.host_rows.numpy()
    row = np.arange(len(position)) if shared is None else shared.host_row.numpy()
    return _table(kept, labels.cpu().numpy(), row, position, rows.device)


def _table(
    kept: Sequence, labels: np.ndarray, row: np.ndarray, position: np.ndarray, device: torch.device
) -> KeptTokens:
    if len(kept) != len(row):
        raise ValueError(f"kept: expected {len(row)} lists, one for each scored token, got {len(kept)}")
    sets = [_checked(given, i) for i, given in enumerate(kept)]
    counts = np.array([len(s) for s in sets], np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *sets])
    token = np.repeat(np.arange(len(sets)), counts)
    if len(flat) and flat.min() < 0:
        raise ValueError(f"kept: expected token ids of at least 0, got {flat.min()}")
    missing = counts > 0
    missing[token[flat == labels[row][token]]] = False
    if missing.any():
        i = int(missing.argmax())
        raise ValueError(f"kept[{i}]: expected the scored token {labels[row[i]]} among those that were kept, it is not")
    largest = int(flat.max()) if len(flat) else -1
    if len(position) == len(row) == len(np.unique(position)):
        return _on(torch.from_numpy(flat), None, counts, largest, device)
    _, place = np.unique(position, return_inverse=True)
    of_token = place[row]
    whole = np.zeros(place.max(initial=-1) + 1, bool)
    whole[of_token[counts == 0]] = True
    both = np.unique(of_token[token] * (largest + 1) + flat)
    both = both[~whole[both // (largest + 1)]] if len(both) else both
    of_place = np.bincount(both // (largest + 1), minlength=len(whole)) if len(both) else np.zeros(len(whole), np.int64)
    starts = np.cumsum(of_place) - of_place
    index = torch.from_numpy(_ranges(starts[place], of_place[place]))
    return _on(torch.from_numpy(both % (largest + 1)), index, of_place[place], largest, device)


def _checked(given, i: int) -> np.ndarray:
    """(K,) int64: the ids of one token's set; none for the whole vocabulary."""
    if given is None:
        return np.zeros(0, np.int64)
    ids = np.asarray(given)
    if ids.ndim != 1 or not (ids.size and np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"kept[{i}]: expected None or the ids of at least one token, got {describe(given)}")
    return ids.astype(np.int64)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as it counts."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def _on(
    token_ids: Tensor, index: Tensor | None, counts: np.ndarray, largest: int, device: torch.device | None = None
) -> KeptTokens:
    device = token_ids.device if device is None else device
    row = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device, non_blocking=True)
    if index is not None:
        token_ids = token_ids[index.to(token_ids.device, non_blocking=True)]
    return KeptTokens(token_ids.to(device, non_blocking=True), row, torch.from_numpy(np.array(counts)), largest)
