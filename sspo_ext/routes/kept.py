# SPDX-License-Identifier: Apache-2.0
"""Logits of rows whose tokens were drawn among a part of the vocabulary: -inf outside it.

The kernels take such logits as they are: their probability is 0 and their gradient too.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..layout.kept import KeptTokens
from ..layout.steps import StepLayout


def check_kept(layout: StepLayout, logit_softcap: float | None, tp_group) -> None:
    """Raises for what does not go with kept tokens."""
    if layout.kept is None:
        return
    if logit_softcap is not None:
        raise ValueError(
            f"logit_softcap: expected None beside kept tokens, since a cap makes -inf finite, got {logit_softcap!r}; "
            "cap the logits before, and use the logits route"
        )
    if tp_group is not None:
        raise ValueError("tp_group: expected None beside kept tokens, which are not shared out over ranks, got a group")


def narrowed(logits: Tensor, rows: Tensor, kept: KeptTokens | None) -> Tensor:
    """A copy of `logits` (..., V) with -inf at the tokens that were not kept; differentiable. Row u is rows[u]."""
    if kept is None:
        return logits
    vocab = logits.shape[-1]
    at = rows.index_select(0, kept.row)
    some = torch.zeros(logits[..., 0].numel(), dtype=torch.bool, device=logits.device).index_fill(0, at, True)
    left_out = some[:, None].repeat(1, vocab)
    left_out = left_out.view(-1).index_fill(0, at * vocab + kept.token_ids, False)
    return logits.masked_fill(left_out.view(logits.shape), -torch.inf)


class KeptRows:
    """The kept tokens of rows in the order of a plan, for chunks of their logits."""

    def __init__(self, token_ids: Tensor, row: Tensor, counts: Tensor, order: np.ndarray | None, place: Tensor | None):
        """`order`: the rows in the plan's order, on the host; `place`: where each row is in it, on the device."""
        by_place = counts.numpy()
        self.token_ids, self.row = token_ids, row
        if order is not None:
            assert place is not None
            by_place = by_place[order]
            self.row, ascending = place.index_select(0, row).sort(stable=True)
            self.token_ids = token_ids.index_select(0, ascending)
        self.ends = [0, *accumulate(by_place.tolist())]

    def narrow(self, logits: Tensor, start: int, end: int) -> Tensor:
        """Writes -inf over the logits (n, V) of rows [start, end) at the tokens that were not kept."""
        first, last = self.ends[start], self.ends[end]
        if first < last:
            row, ids = self.row[first:last] - start, self.token_ids[first:last]
            values = logits[row, ids]
            some = torch.zeros(end - start, dtype=torch.bool, device=logits.device).index_fill_(0, row, True)
            logits.masked_fill_(some[:, None], -torch.inf)
            logits[row, ids] = values
        return logits
