# SPDX-License-Identifier: Apache-2.0
"""Draws one token for each row of logits, from uniform numbers that follow from the rows' seeds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .sampling import Sampling

_BELOW_ONE = 1 - 2**-24  # the greatest float32 below 1


class Chooser:
    """Chooses one token for each row from the logits of the last position."""

    def __init__(self, sampling: Sampling, seeds: Sequence[Sequence[int]], device: torch.device):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.sampling = sampling
        self.narrow: list[Callable[..., Tensor]] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self.narrow += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        if sampling.temperature:
            draws = [np.random.default_rng(list(seed)).random(sampling.max_completion_length) for seed in seeds]
            self.uniform = torch.from_numpy(np.array(draws)).clamp(max=_BELOW_ONE).float().to(device)

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> Tensor:
        """Draws token `t` of the rows numbered `rows` (n,) from their `logits` (n, V): (n,) int64."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        logits = logits.float() / self.sampling.temperature
        for warp in self.narrow:
            logits = warp(None, logits)
        cumulative = logits.softmax(-1).cumsum(-1)
        target = self.uniform[rows, t, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class ChooseOne:
    """A logits processor for `generate` that leaves only the chosen token possible."""

    def __init__(self, chooser: Chooser, prompt_width: int):
        self.chooser, self.width = chooser, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) that are 0 for the chosen token and -inf for all others."""
        rows = torch.arange(len(scores), device=scores.device)
        drawn = self.chooser(scores, rows, input_ids.shape[1] - self.width)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)
