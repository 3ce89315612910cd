# SPDX-License-Identifier: Apache-2.0
"""Draws one token for each row of logits, from uniform numbers that follow from the rows' seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .sampling import Completions, Sampling

_BELOW_ONE = 1 - 2**-24  # the greatest float32 below 1
_SMALL, _BLOCK = 4096, 512  # tokens


class Chooser:
    """Chooses one token for each row from the logits of the last position.

    It keeps the log-probs and the kept tokens that `sampling` asks for; without that it does nothing beside drawing.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[Sequence[int]], device: torch.device):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.sampling = sampling
        self.narrow: list[Callable[..., Tensor]] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self.narrow += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        if sampling.temperature:
            draws = [np.random.default_rng(list(seed)).random(sampling.max_completion_length) for seed in seeds]
            self.uniform = torch.from_numpy(np.array(draws)).clamp(max=_BELOW_ONE).float().to(device)
        self.logps: Tensor | None = None  # (n, L) float32
        if sampling.logps:
            self.logps = torch.zeros(len(seeds), sampling.max_completion_length, device=device)
        self.kept: list[list[Tensor]] | None = [[] for _ in seeds] if sampling.kept and self.narrow else None

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> Tensor:
        """Draws token `t` of the rows numbered `rows` (n,) from their `logits` (n, V): (n,) int64."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        logits = logits.float()
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        for warp in self.narrow:
            logits = warp(None, logits)
        drawn = draw(logits.softmax(-1), self.uniform[rows, t, None])
        if self.logps is not None:
            self.logps[rows, t] = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        if self.kept is not None:
            which, ids = (logits != -torch.inf).nonzero().int().cpu().unbind(1)
            parts = ids.split(torch.bincount(which, minlength=len(logits)).tolist())
            for row, part in zip(rows.tolist(), parts, strict=True):
                self.kept[row].append(part)
        return drawn

    def completions(self, token_ids: list[list[int]]) -> Completions:
        """What was drawn, with what is known of it. `token_ids` are those of all rows, without what follows the end."""
        lengths = [len(ids) for ids in token_ids]
        logps, kept = None, None
        if self.logps is not None:
            logps = [row[:n] for row, n in zip(self.logps.tolist(), lengths, strict=True)]
        if self.kept is not None and self.sampling.temperature:
            kept = [row[:n] for row, n in zip(self.kept, lengths, strict=True)]
        return Completions(token_ids, logps, kept)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token of each row: the first at which the running sum of `p` exceeds `uniform` times its whole sum.

    In a large vocabulary a block of tokens is drawn, then one of its tokens: a running sum over all takes longer than
    the softmax.

    Args:
        p: (n, V) float32, not negative. A row need not add up to 1.
        uniform: (n, 1) float32 in [0, 1).

    Returns:
        (n,) int64. A token with `p` 0 is never drawn.
    """
    size = p.shape[1]
    if size <= _SMALL:
        cumulative = p.cumsum(-1)
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp(max=size - 1)
    whole = size - size % _BLOCK
    rest = p[:, whole:].sum(1, keepdim=True)
    sums = torch.cat([p[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2), rest], 1).double()
    cumulative = sums.cumsum(1)
    target = uniform * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[1] - 1)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=p.device)
    # behind the end stands the last token again, which is reached after itself
    inside = p.gather(1, ids.clamp(max=size - 1)).double().cumsum(1)
    target = (target - (cumulative - sums).gather(1, block)).clamp(min=0)
    # the block's sum, rounded otherwise above, must not be reached
    target = torch.minimum(target, torch.nextafter(inside[:, -1:], torch.zeros_like(target)))
    return (block * _BLOCK + torch.searchsorted(inside, target, right=True))[:, 0].clamp(max=size - 1)


class ChooseOne:
    """A logits processor for `generate` that leaves only the chosen token possible."""

    def __init__(self, chooser: Chooser, prompt_width: int):
        self.chooser, self.width = chooser, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) that are 0 for the chosen token and -inf for all others."""
        rows = torch.arange(len(scores), device=scores.device)
        drawn = self.chooser(scores, rows, input_ids.shape[1] - self.width)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)
