# SPDX-License-Identifier: Apache-2.0
"""Values by likelihood: the probability of the gold answer after the probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..branches.branch import Branch
from ..branches.score import branch_logps
from .states import States
from .texts import Answer


def likelihood_values(
    model: nn.Module, states: States, answers: Sequence[Answer], *, reduce: str, engine: str, max_tokens: int
) -> torch.Tensor:  # (states,) float32 in [0, 1]
    """Return the likelihood of the gold answer at every state; see `probe_step_values`."""
    branches, counts = [], []
    for state in states.at:
        probe, spellings = states.encoded(state, answers[state.sequence])
        spellings = _distinct(spellings, reduce)
        given = [*state.more, *probe]
        branches += [Branch(state.sequence, state.cut, [*given, *ids], len(given)) for ids in spellings]
        counts.append(len(spellings))
    logps = branch_logps(model, states.trunks, branches, engine=engine, max_tokens=max_tokens)
    scores = logps.sums()
    if reduce == "mean":
        scores = scores / logps.offsets.diff()
    offsets = torch.tensor([0, *np.cumsum(counts)], device=scores.device)
    how = "sum" if reduce == "joint" else "max"
    return torch.segment_reduce(scores.exp(), how, offsets=offsets).clamp(0, 1)


def _distinct(spellings: list[list[int]], reduce: str) -> list[list[int]]:
    """Drop repeated texts, and for sums every text that begins with another: the rest exclude each other."""
    kept: list[list[int]] = []
    for ids in sorted(spellings, key=len):
        if not any(ids[: len(other)] == other if reduce == "joint" else ids == other for other in kept):
            kept.append(ids)
    return kept
