# SPDX-License-Identifier: Apache-2.0
"""Step log-probs written by hand."""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import torch

from sspo_ext.layout.steps import StepLayout
from sspo_ext.objective.sums import StepLogps, sums_over_steps

F64 = torch.float64


def t(*values):
    return torch.tensor(values, dtype=F64)


def made(*sequences, **more):
    """Log-probs and layout of sequences of steps, each step a list of token log-probs (an empty one is possible)."""
    B, T = len(sequences), 1 + max(sum(len(s) for s in seq) for seq in sequences)
    labels, ids = torch.full((B, T), -100), torch.full((B, T), -1)
    tokens = []
    for b, steps in enumerate(sequences):
        at = 1
        for k, step in enumerate(steps):
            labels[b, at : at + len(step)], ids[b, at : at + len(step)] = 0, k
            tokens += step
            at += len(step)
    layout = StepLayout.from_step_ids(labels, ids)
    tokens = t(*tokens).requires_grad_()
    return StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens, **more), layout


def softplus(x):
    return math.log1p(math.exp(x))
