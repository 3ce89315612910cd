# SPDX-License-Identifier: Apache-2.0
"""Values by likelihood: the probability of the gold answer after the probe, or its logarithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from ..._checks import check_kind
from ..branches.branch import Branch
from ..branches.score import branch_logps
from ..values import StepValues
from .options import FLOOR, check_floor
from .states import States
from .texts import Answer


def likelihood_values(
    model: nn.Module,
    states: States,
    answers: Sequence[Answer],
    *,
    reduce: str,
    engine: str,
    max_tokens: int,
    floor: float = FLOOR,
) -> torch.Tensor:  # (states,) float32 in [0, 1], or in [floor, 0]
    """Return the likelihood of the gold answer at every state; see `probe_step_values`."""
    return probes_likelihoods(
        model, [states], answers, reduce=reduce, engine=engine, max_tokens=max_tokens, floor=floor
    )[0]


def probes_likelihoods(
    model: nn.Module,
    probed: Sequence[States],
    answers: Sequence[Answer],
    *,
    reduce: str,
    engine: str,
    max_tokens: int,
    floor: float = FLOOR,
) -> list[torch.Tensor]:  # one of (states,) for each
    """`likelihood_values` of several probes of the same sequences, which are then read once for all of them."""
    branches, counts = [], []
    for states in probed:
        for state, (given, spellings) in zip(states.at, spelled(states, answers, reduce), strict=True):
            branches += [Branch(state.sequence, state.cut, [*given, *ids], len(given)) for ids in spellings]
            counts.append(len(spellings))
    logps = branch_logps(model, probed[0].trunks, branches, engine=engine, max_tokens=max_tokens)
    values = reduced(logps.sums(), logps.offsets.diff(), counts, reduce, floor)
    return list(values.split([len(states.at) for states in probed]))


def spelled(states: States, answers: Sequence[Answer], reduce: str) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For every state, the tokens between it and an answer, and the tokens of each accepted answer."""
    for state in states.at:
        probe, spellings = states.encoded(state, answers[state.sequence])
        yield [*state.more, *probe], _distinct(spellings, reduce)


def reduced(
    sums: torch.Tensor, lengths: torch.Tensor, counts: Sequence[int], reduce: str, floor: float = FLOOR
) -> torch.Tensor:
    """Every state's value from the log-probs (n,) and lengths (n,) of its `counts` answers."""
    scores = sums / lengths if reduce == "mean" else sums
    offsets = torch.tensor([0, *np.cumsum(counts)], device=scores.device)
    if reduce == "logprob":
        # the largest is taken out of the sum, since exp of -100 is 0 in float32
        largest = torch.segment_reduce(scores, "max", offsets=offsets).clamp(min=torch.finfo(scores.dtype).min)
        shares = (scores - largest.repeat_interleave(offsets.diff())).exp()
        return (largest + torch.segment_reduce(shares, "sum", offsets=offsets).log()).clamp(floor, 0)
    how = "sum" if reduce == "joint" else "max"
    return torch.segment_reduce(scores.exp(), how, offsets=offsets).clamp(0, 1)


def unit_values(values: StepValues, floor: float = FLOOR) -> StepValues:
    r"""Put log-probabilities on the scale of rewards in [0, 1]: 1 + V / |floor|.

    A reward of 1 is log 1 = 0 there, and a reward of 0 is the floor, as far as log 0 can be. So at gamma = 1 and
    lambda = 0 a step's advantage is the information that it adds, log V_k - log V_{k-1}, in units of |floor| nats. The
    last step of a right answer gains -log V_{K-1} of them, which is the model's surprise; that of a wrong one loses
    log V_{K-1} - floor. Logarithms themselves have no place beside a discount: of values below 0, gamma * V - V is
    above 0, and every idle step would be rewarded. The scale is ours.

    Args:
        values: of `probe_step_values` with reduce="logprob", in [floor, 0].
        floor: of the same call.

    Returns:
        Values in [0, 1].

    Raises:
        ValueError: if a value (on the host) is outside [floor, 0], or the floor is not below 0.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> unit_values(StepValues.from_lists([[-10.0, -2.5, 0.0]]), floor=-10.0).to_lists()
        [[0.0, 0.75, 1.0]]
    """
    check_kind("values", values, StepValues, "StepValues")
    check_floor(floor)
    v = values.values
    if v.device.type == "cpu" and len(v) and not (v.min() >= floor and v.max() <= 0):
        raise ValueError(
            f"values: expected log-probabilities in [{floor:g}, 0], got some in [{v.min():g}, {v.max():g}]"
        )
    return values.with_values(1 - v / floor)


def _distinct(spellings: list[list[int]], reduce: str) -> list[list[int]]:
    """Drop repeated texts, and for sums every text that begins with another: the rest exclude each other."""
    kept: list[list[int]] = []
    for ids in sorted(spellings, key=len):
        if not any(ids == other if reduce == "mean" else ids[: len(other)] == other for other in kept):
            kept.append(ids)
    return kept
