# SPDX-License-Identifier: Apache-2.0
"""Several rewards for one completion: summed and then compared, or compared each by itself and then summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import check_choice, check_float, describe
from .baselines import EPSILON, outcome_advantages

_SAME = 1e-6  # a standard deviation of rewards that do not differ

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def summed_rewards(rewards: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The weighted sum of each completion's rewards.

    Args:
        rewards: (B, R) float: of each completion by each function. NaN: the function does not apply to it.
        weights: One for each function; None means 1 each.

    Returns:
        (B,) float32 or float64: the sum over the functions that apply; NaN where none does.

    Raises:
        ValueError: If a shape or a weight does not fit.
        TypeError: If `rewards` is no float tensor.

    Examples:
        >>> summed_rewards(torch.tensor([[1.0, 0.5], [0.0, float("nan")]]), [1.0, 2.0])
        tensor([2., 0.])
    """
    rewards, scale = _checked(rewards, weights)
    nothing = rewards.isnan().all(1)
    return torch.where(nothing, torch.nan, (rewards * scale).nansum(1))


def rewards_advantages(
    rewards: Tensor,
    name: str = "rloo",
    *,
    groups: Tensor | None = None,
    weights: Sequence[float] | None = None,
    how: str = "sum_then_normalize",
) -> Tensor:
    """Outcome advantages of completions with several rewards.

        sum_then_normalize   of the weighted sum of rewards, as GRPO has it
        normalize_then_sum   the weighted sum of each reward's own advantages, each divided by its standard deviation
                             over the batch (plus 1e-4), as MO-GRPO (arXiv 2509.22047) and GDPO (arXiv 2601.05242) do

    With the first, a reward of a large scale or spread drowns the others. With the second it does not: rewards that are
    multiplied by a constant give the same advantages, up to the 1e-4. MO-GRPO divides within a group, which is `name`
    "grpo" here; that all of a batch is divided once more changes only how the functions are weighed. A completion gets
    nothing from a function that does not apply to it, and is not compared by it.

    Args:
        rewards: (B, R) float: of each completion by each function. NaN: the function does not apply to it.
        name: The baseline, see `outcome_advantages`.
        groups: (B,) int: the question that each completion answers.
        weights: One for each function; None means 1 each.
        how: One of `AGGREGATIONS`. The names are TRL's.

    Returns:
        (B,) advantages, detached, in float32, or in float64 if the rewards are float64.

    Raises:
        ValueError: If a name is unknown, a shape or a weight does not fit, or no function applies to a completion.
        TypeError: If an argument has the wrong type, or `groups` is missing.

    Examples:
        >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 300.0], [0.0, 100.0]])
        >>> groups = torch.tensor([0, 0, 0])
        >>> rewards_advantages(rewards, "dr_grpo", groups=groups).argmax().item()  # the loud reward alone
        1
        >>> even = rewards_advantages(rewards, "dr_grpo", groups=groups, weights=[2, 1], how="normalize_then_sum")
        >>> even.argmax().item()
        0
    """
    check_choice("how", how, AGGREGATIONS)
    rewards, scale = _checked(rewards, weights)
    alone = rewards.isnan().all(1).nonzero()
    if len(alone):
        raise ValueError(
            f"rewards: expected a function that applies to each completion, got none for {alone[0].item()}"
        )
    if how == "sum_then_normalize":
        return outcome_advantages((rewards * scale).nansum(1), name, groups=groups)
    total = torch.zeros_like(rewards[:, 0])
    for column, weight in zip(rewards.unbind(1), scale.tolist(), strict=True):
        applies = ~column.isnan()
        own = outcome_advantages(column[applies], name, groups=None if groups is None else groups[applies])
        std = own.std() if len(own) > 1 else own.new_zeros(())
        # a baseline that takes no mean off leaves equal rewards as they are, and so does this
        total[applies] += weight * torch.where(std > _SAME, own / (std + EPSILON), own)
    return total


def _checked(rewards: Tensor, weights: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    check_float("rewards", rewards, ndim=2)
    rewards = rewards.detach() if rewards.dtype == torch.float64 else rewards.detach().float()
    count = rewards.shape[1]
    if not count:
        raise ValueError("rewards: expected (B, R) of at least one function, got none")
    if weights is not None and len(weights) != count:
        raise ValueError(f"weights: expected one for each of {count} functions, got {describe(weights)}")
    scale = rewards.new_ones(count) if weights is None else rewards.new_tensor([float(weight) for weight in weights])
    if not scale.isfinite().all():
        raise ValueError(f"weights: expected finite numbers, got {weights}")
    return rewards, scale
