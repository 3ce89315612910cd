# SPDX-License-Identifier: Apache-2.0
"""Values by grades: the model answers a few times after each step, and a grader judges the answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...hf.wrappers import model_device
from ..branches.branch import Branch
from ..branches.sample import sample_branches
from .options import ProbeOptions
from .states import States, special_ids


def graded_values(
    model: nn.Module, states: States, answers: Sequence[Any], tokenizer, options: ProbeOptions
) -> torch.Tensor:  # (S + B,) float32
    """Return the mean grade of every state's sampled answers; see `probe_step_values`."""
    grader = options.grader
    if tokenizer is None:
        raise ValueError("tokenizer: expected one, since graded answers are texts")
    if not callable(grader):
        raise ValueError(f"grader: expected a function of an answer's text and the gold answer, got {grader!r}")
    special = special_ids(model, tokenizer)
    branches = [Branch(s.sequence, s.cut, [*s.more, *states.probe_ids(s)]) for s in states.at]

    def text(ids: list[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False).strip()

    def ends_line(ids: list[int]) -> bool:
        return "\n" in tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip()

    sampled = sample_branches(
        model, states.trunks, branches, options.num_samples if options.temperature else 1,
        max_new_tokens=options.max_answer_tokens, stop=ends_line, eos_token_ids=sorted(special),
        temperature=options.temperature, seed=options.seed, engine=options.engine, max_tokens=options.max_tokens,
    )  # fmt: skip
    values: list[float] = []
    for branch, some in zip(branches, sampled, strict=True):
        texts = [text(ids) for ids in some]
        grades = {t: float(grader(t, answers[branch.trunk])) for t in dict.fromkeys(texts)}
        wrong = next((g for g in grades.values() if not 0 <= g <= 1), None)
        if wrong is not None:
            raise ValueError(f"grader: expected grades in [0, 1], got {wrong}")
        values.append(sum(grades[t] for t in texts) / len(texts))
    if values and not any(values):
        warnings.warn(
            "graded probe: the grader gave 0 to every answer of a whole batch. If this continues, the values say "
            "nothing and only the discount is trained. Check what grader(text, answer) gets: the short answer alone",
            stacklevel=2,
        )
    return torch.tensor(values, device=model_device(model))
