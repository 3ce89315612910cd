# SPDX-License-Identifier: Apache-2.0
"""A policy loss whose tokens share rows: the problem in the order of the plan's groups, and each group's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...objective.policy import PolicyProblem, Segments
from ..tree_rows import add_in_order
from .cache import kept_on_device, to_device
from .plan import Group, LinearPlan
from .step_rows import StepRows


@dataclass(frozen=True, eq=False)
class SharedTokens:
    """The tokens of a plan's groups, whose order is that of the problem."""

    problem: PolicyProblem
    spans: list[tuple[int, int]]  # of each group's tokens
    rows: list[Tensor]  # of each group: (n,) the row of each token, counted from the group's first

    def coefs(self, number: int, group: Group, of: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """(R,) or (R, K): what `of` gives for a group's tokens, summed over each row.

        `values` are those of the plan's rows that `of` needs for the tokens.
        """
        rows = self.rows[number]
        tokens = [v[group.start : group.end].index_select(0, rows) if len(v) else v for v in values]
        made = of(self.problem.part(*self.spans[number]), *tokens)
        return add_in_order(made, rows, group.end - group.start)


def shared_tokens(plan: LinearPlan, problem: PolicyProblem, row: np.ndarray, device: torch.device) -> SharedTokens:
    """The problem's tokens, group by group."""
    spans, which, rows, segments = kept_on_device(plan, "tokens", device, lambda: _tables(plan, problem, row, device))

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, which)

    ordered = replace(
        problem, advantage=pick(problem.advantage), old=pick(problem.old), ref=pick(problem.ref),
        scale=pick(problem.scale), segments=segments,
    )  # fmt: skip
    return SharedTokens(ordered, spans, rows)


def _tables(plan: LinearPlan, problem: PolicyProblem, row: np.ndarray, device: torch.device):
    """Spans, tokens and rows of the groups, and their segments, if tokens have any."""
    place = np.arange(plan.num_rows)
    if plan.order is not None:
        place[plan.order] = np.arange(plan.num_rows)
    segments = None
    if problem.segments is None:
        order = np.argsort(row, kind="stable")
        ends = np.searchsorted(row[order], [group.end for group in plan.groups])
        tokens = np.split(order, ends[:-1]) if plan.groups else []
    else:
        units = StepRows(problem.segments.host_offsets.numpy(), row)
        tokens = [units.tokens(group.steps) for group in plan.groups]
        counts = np.concatenate([np.zeros(1, np.int64), *(units.counts[group.steps] for group in plan.groups)])
        host = np.cumsum(counts)
        segments = Segments(to_device(host.astype(np.int32), device), None, torch.from_numpy(host))
    lengths = [len(t) for t in tokens]
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    own = [place[row[t]] - group.start for t, group in zip(tokens, plan.groups, strict=True)]
    nothing = np.zeros(0, np.int64)
    which, rows = (to_device(np.concatenate([nothing, *values]), device) for values in (tokens, own))
    return spans, which, list(rows.split(lengths)), segments
