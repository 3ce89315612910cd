# SPDX-License-Identifier: Apache-2.0
"""A batch as engines hand it to a loss or an advantage estimator, and the same by the list forms."""

from types import SimpleNamespace

import torch

from sspo_ext.signals import StepValues, combine_advantages, step_gae, steps_to_tokens

LISTS = [[0.1, 0.4, 0.8, 0.0], [0.2, 0.0], [0.3, 0.3, 0.6, 0.0], [0.5, 0.25, 0.75, 1.0, 0.0]]
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0])


def at_starts(ids):
    """(B, T): the lists at the first tokens of their steps, NaN elsewhere."""
    values = torch.full(ids.shape, float("nan"))
    for b, row in enumerate(LISTS):
        for k, value in enumerate(row[:-1]):
            values[b, int((ids[b] == k).nonzero()[0])] = value
    return values


def by_lists(ids, outcome):
    values = StepValues.from_lists(LISTS)
    steps = step_gae(values, REWARDS, gamma=0.9, lam=0.8)
    return steps_to_tokens(combine_advantages(steps, outcome, values.step_sequence), ids)


def engine_batch():
    """Step ids, mask, advantages of steps, old and new log-probs (4, 7)."""
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor(
        [[0, 0, 1, 2, 2, 2, -1], [0, 0, 0, 0, -1, -1, -1], [0, 1, -1, -1, 1, 2, 2], [-1, 0, 1, 1, 2, 3, -1]]
    )
    advantages = steps_to_tokens(torch.randn(11, generator=g), ids)
    old = -torch.rand(4, 7, generator=g) * 2
    logp = (old + torch.randn(4, 7, generator=g) * 0.3).requires_grad_()
    return SimpleNamespace(ids=ids, mask=(ids >= 0).float(), advantages=advantages, old=old, logp=logp)
