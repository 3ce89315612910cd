# SPDX-License-Identifier: Apache-2.0
"""Verbal value probing: what a state is worth to the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..._checks import describe
from ..values import StepBatch, StepValues
from .graded import graded_values
from .likelihood import likelihood_values
from .options import FLOOR, ProbeOptions
from .states import States
from .texts import Answer, AnyProbe, Probe


def probe_step_values(
    model: nn.Module,
    batch: StepBatch,
    probe: AnyProbe | Sequence[str | Probe],
    answers: Sequence[Answer] | Sequence[Any],
    *,
    mode: str = "likelihood",
    reduce: str = "joint",
    floor: float = FLOOR,
    engine: str = "auto",
    max_tokens: int = 4096,
    tokenizer=None,
    grader: Callable[[str, Any], float] | None = None,
    num_samples: int = 5,
    max_answer_tokens: int = 10,
    temperature: float = 0.6,
    seed: int = 0,
) -> StepValues:
    r"""Compute the values V_0, ..., V_K of every sequence: after the question alone, and after each of its K steps.

    A short text, the probe, is appended to each state, so that the model answers at once. V_k is in [0, 1], on the
    scale of E[reward | the model answers after step k], and has no gradient (only "logprob" has a scale of its own).
    There are two modes:

        likelihood   the probability of the gold answer after the probe
        graded       the mean grade of a few short answers that are sampled after the probe

    SSPO (arXiv 2508.12604) calls this verbal value probing. Its prompt and its exact value are not public: the texts,
    the two modes and their defaults are our reconstruction.

    Args:
        model: any Hugging Face causal LM, wrapped or not. It runs in eval mode, and its modes are restored.
        batch: B sequences: prompts (with the tokens of a chat template, where there is one) and steps. Special tokens
            at the end of a response are left out before the probe: V_K is asked of the text.
        probe: a language of `PROBES`, another text, a `Probe` or token ids; or B texts and Probes, one for each
            sequence. `as_probe` tells how a text is read.
        answers: B gold answers. With "likelihood": a text, several accepted texts, or the same in token ids; a number
            counts as its text if the probe is a text. With "graded": whatever `grader` takes.
        mode: "likelihood" or "graded".
        reduce: with "likelihood", the value of an answer of several tokens. "joint" is exp(sum of log p), the
            probability of the answer. "mean" is exp(mean of log p), which overstates long answers; with exact-match
            rewards the model then learns never to answer. Of several accepted texts, "joint" adds the probabilities
            (a text that begins with another counts as that other, so they exclude each other), and "mean" takes the
            largest. "logprob" is the logarithm of "joint", in [floor, 0]: `unit_values` puts it on the scale of
            rewards. It tells .001 from .0001, as likelihoods of long or unlikely answers are (arXiv 2602.03979).
        floor: with "logprob", the least value, below 0; an impossible answer has it.
        engine: how the states are computed, see `branch_logps`: "auto", "packed", "shared", "cached" or "separate".
            With "graded" answers are sampled from a cache: "auto", "cached" or "separate". All give the same numbers.
        max_tokens: the budget of one forward in tokens.
        tokenizer: needed for a probe or answers that are texts, and with "graded".
        grader: with "graded", grader(text of a sampled answer, gold answer) -> bool or a number in [0, 1].
        num_samples: with "graded", the answers sampled at each state. An answer ends with its line or the model's turn.
            Each has random numbers of its own, so answers depend neither on the engine nor on the batch.
        max_answer_tokens: with "graded", the largest number of tokens of an answer.
        temperature: with "graded", the sampling temperature; 0 is one greedy answer.
        seed: with "graded", the seed of the random numbers.

    Returns:
        Values in float32 on the model's device.

    Raises:
        ValueError: if an argument does not fit or has no effect in this mode, the model does not support the engine, or
            (on the host) a value is not finite.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> batch = StepBatch([tokenizer("6 + 13 + 7 = ?\n").input_ids], [[tokenizer("6 + 13 = 19\n").input_ids]])
        >>> values = probe_step_values(model, batch, "####", ["26"], tokenizer=tokenizer)
        >>> [v_0, v_1] = values.to_lists()[0]
    """
    options = ProbeOptions(
        mode=mode, reduce=reduce, floor=floor, engine=engine, max_tokens=max_tokens, grader=grader,
        num_samples=num_samples, max_answer_tokens=max_answer_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    if not isinstance(batch, StepBatch):
        raise TypeError(f"batch: expected a StepBatch, got {describe(batch)}")
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    states = States(model, batch, probe, tokenizer)
    if mode == "graded":
        values = graded_values(model, states, answers, tokenizer, options)
    else:
        values = likelihood_values(
            model, states, answers, reduce=reduce, floor=floor, engine=engine, max_tokens=max_tokens
        )
    offsets = np.cumsum([0, *(len(steps) + 1 for steps in batch.step_ids)])
    return StepValues.from_tensor(values, torch.from_numpy(offsets))
