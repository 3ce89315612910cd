# SPDX-License-Identifier: Apache-2.0
"""Step log-probs of rows that are cut between processes (context or sequence parallel)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import check_device, check_kind, check_shape
from ..layout.part import LayoutPart
from ..objective.sums import StepLogps, sums_over_steps
from ..routes.shared import refuse_double_backward

_OF_TOKENS = ("tokens", "entropy", "sum_p2", "kl")


def gather_logps(logps: StepLogps, part: LayoutPart, group: Any = None) -> StepLogps:
    """The log-probs of whole rows, from those that each process has of its own positions; differentiable in these.

    Every process then computes the loss of the whole rows, of the same numbers in the same order as one process alone.
    Its backward gives each process the gradient of its own positions, so the whole gradient of a weight is the sum over
    the processes. What averages gradients over them (DDP, FSDP) needs the loss times their number.

    It costs one all-reduce of a few numbers a token, and waits for the device once, to check that every row is on
    exactly one process.

    Args:
        logps: StepLogps of `part.layout`, of `step_logps` or `linear_step_logps`.
        part: LayoutPart of this process.
        group: the process group that shares the rows; None is the default group, or this process alone without one.

    Returns:
        StepLogps of `part.whole`, for `pref_loss`, `policy_loss` and every loss that takes StepLogps.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: The log-probs are not those of the part's layout, or a scored row is on no process or on several.

    Examples:
        >>> positions = torch.arange(16).chunk(1)[0]  # those of process 0 of 1
        >>> part = LayoutPart.from_positions(layout, positions)
        >>> mine = linear_step_logps(hidden[:, positions], model.lm_head.weight, part.layout)
        >>> out = policy_loss(gather_logps(mine, part), layout, advantages)
    """
    check_kind("logps", logps, StepLogps, "StepLogps")
    check_kind("part", part, LayoutPart, "a LayoutPart")
    names = [name for name in _OF_TOKENS if getattr(logps, name) is not None]
    for name in names:
        check_shape(f"logps.{name}", getattr(logps, name), (part.layout.num_rows,))
    check_device("logps", logps.tokens, part.rows.device, "the layout")
    *values, owners = _Gather.apply(torch.stack([getattr(logps, name) for name in names]), part, group)
    wrong = (owners != 1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        sequence, position = divmod(int(part.whole.rows[row]), part.whole.shape[1])
        raise ValueError(
            f"positions: expected every scored position on exactly one process, got position {position} of row "
            f"{sequence} on {int(owners[row])}"
        )
    found = dict(zip(names, values, strict=True))
    return StepLogps(sums_over_steps(found["tokens"], part.whole), part.whole.counts, **found)


class _Gather(torch.autograd.Function):
    """(K, N') values of a process's rows -> (K + 1, N) of all; the last line says how many processes have the row."""

    @staticmethod
    def forward(ctx, values: Tensor, part: LayoutPart, group: Any) -> Tensor:
        ctx.save_for_backward(part.rows)
        everyone = values.new_zeros(len(values) + 1, part.whole.num_rows)
        everyone[:-1, part.rows] = values
        everyone[-1, part.rows] = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(everyone, group=group)
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx, d_everyone: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the loss is the same on every process, so what a value adds to it is counted once, where the value is
        refuse_double_backward()
        (rows,) = ctx.saved_tensors
        return d_everyone[:-1, rows], None, None
