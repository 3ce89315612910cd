# SPDX-License-Identifier: Apache-2.0
"""Probing through an inference engine: what to ask it, and the values that its answers give.

An engine needs to do one thing: give the log-probs of these continuation tokens after these prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..._checks import check_choice, check_kind
from ..values import StepBatch, StepValues
from .likelihood import reduced, spelled
from .options import FLOOR, REDUCE, check_floor
from .states import States
from .texts import Answer, AnyProbe, Probe


@dataclass(frozen=True)
class ProbeRequests:
    """What an engine is asked for the values of a batch. States of one sequence follow each other and share prefixes.

    Attributes:
        prompts: n lists of token ids: a state and the probe after it.
        continuations: n lists of token ids: an accepted answer after this prompt.
        counts: how many of them belong to each state, state by state.
        offsets: (B + 1,) int64 on the host, where each sequence's states begin and end.
        reduce: as in `probe_step_values`.
    """

    prompts: list[list[int]]
    continuations: list[list[int]]
    counts: list[int]
    offsets: torch.Tensor
    reduce: str

    def __len__(self) -> int:
        return len(self.prompts)


def probe_requests(
    batch: StepBatch,
    probe: AnyProbe | Sequence[str | Probe],
    answers: Sequence[Answer],
    *,
    reduce: str = "joint",
    tokenizer=None,
    model=None,
) -> ProbeRequests:
    """Make the requests whose log-probs give the values of `probe_step_values` with mode "likelihood".

    Args:
        batch: as in `probe_step_values`, like the other arguments.
        probe: a text, a Probe, token ids; or one for each sequence.
        answers: B gold answers.
        reduce: "joint", "mean" or "logprob".
        tokenizer: needed for texts.
        model: only its configs are read, for its ends of sequence; None: the tokenizer knows them all.

    Returns:
        ProbeRequests.

    Raises:
        ValueError: if an argument does not fit.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> requests = probe_requests(StepBatch([[5, 6]], [[[7], [8]]]), [9], [[[1, 2]]])
        >>> requests.prompts, requests.continuations
        ([[5, 6, 9], [5, 6, 7, 9], [5, 6, 7, 8, 9]], [[1, 2], [1, 2], [1, 2]])
    """
    check_kind("batch", batch, StepBatch, "a StepBatch")
    check_choice("reduce", reduce, REDUCE)
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    states = States(model, batch, probe, tokenizer)
    prompts, continuations, counts = [], [], []
    for state, (given, spellings) in zip(states.at, spelled(states, answers, reduce), strict=True):
        prompts += [[*states.trunks[state.sequence][: state.cut], *given]] * len(spellings)
        continuations += spellings
        counts.append(len(spellings))
    offsets = np.cumsum([0, *(len(steps) + 1 for steps in batch.step_ids)])
    return ProbeRequests(prompts, continuations, counts, torch.from_numpy(offsets), reduce)


def values_from_logprobs(
    requests: ProbeRequests,
    logprobs: Sequence[Sequence[float]],
    *,
    floor: float = FLOOR,
    device: torch.device | str = "cpu",
) -> StepValues:
    """Turn an engine's log-probs into values.

    Args:
        requests: what was asked.
        logprobs: for each request the log-prob of each continuation token.
        floor: with reduce="logprob", as in `probe_step_values`.
        device: where the values are put.

    Returns:
        Values in float32, in [0, 1], or in [floor, 0] with reduce="logprob".

    Raises:
        ValueError: if there are more or fewer log-probs than tokens, or one is no number or above 0.01.
        TypeError: if `requests` is no ProbeRequests.

    Examples:
        >>> requests = probe_requests(StepBatch([[5]], [[[7]]]), [9], [[[1, 2]]])
        >>> values_from_logprobs(requests, [[-0.7, -0.1], [-0.1, 0.0]]).to_lists()
        [[0.4493..., 0.9048...]]
    """
    check_kind("requests", requests, ProbeRequests, "a ProbeRequests")
    check_floor(floor)
    if len(logprobs) != len(requests):
        raise ValueError(f"logprobs: expected those of {len(requests)} requests, got {len(logprobs)}")
    for i, (found, asked) in enumerate(zip(logprobs, requests.continuations, strict=True)):
        if len(found) != len(asked):
            raise ValueError(f"logprobs: expected {len(asked)} of request {i}, a token each, got {len(found)}")
        for x in found:
            if not isinstance(x, (int, float)) or not x <= 0.01:  # engines round; NaN is below nothing
                raise ValueError(f"logprobs: expected numbers of at most 0, got {x!r} in request {i}")
    sums = torch.tensor([sum(found) for found in logprobs], dtype=torch.float64)
    lengths = torch.tensor([len(asked) for asked in requests.continuations])
    values = reduced(sums, lengths, requests.counts, requests.reduce, floor).float()
    return StepValues.from_tensor(values, requests.offsets).to(device)
