# SPDX-License-Identifier: Apache-2.0
"""Values by likelihood: the probability of the gold answer after the probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    for state, (given, spellings) in zip(states.at, spelled(states, answers, reduce), strict=True):
        branches += [Branch(state.sequence, state.cut, [*given, *ids], len(given)) for ids in spellings]
        counts.append(len(spellings))
    logps = branch_logps(model, states.trunks, branches, engine=engine, max_tokens=max_tokens)
    return reduced(logps.sums(), logps.offsets.diff(), counts, reduce)


def spelled(states: States, answers: Sequence[Answer], reduce: str) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For every state, the tokens between it and an answer, and the tokens of each accepted answer."""
    for state in states.at:
        probe, spellings = states.encoded(state, answers[state.sequence])
        yield [*state.more, *probe], _distinct(spellings, reduce)


def reduced(sums: torch.Tensor, lengths: torch.Tensor, counts: Sequence[int], reduce: str) -> torch.Tensor:
    """Every state's value from the log-probs (n,) and lengths (n,) of its `counts` answers."""
    scores = sums / lengths if reduce == "mean" else sums
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
