# SPDX-License-Identifier: Apache-2.0
"""Advantages from outcome rewards, and how they are combined with advantages of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._checks import check_choice, check_device, check_float, check_integer, check_shape, describe

EPSILON = 1e-4  # added to a standard deviation, as in TRL's GRPOTrainer

_NOISE = 1e-6  # a deviation of at most this share of the largest value is rounding: the values do not differ


def group_index(groups: Tensor) -> tuple[Tensor, int]:
    """Map arbitrary ids (B,) to ((B,) int64 in [0, B), B), without a synchronisation; some numbers may be unused."""
    ordered, order = torch.sort(groups, stable=True)
    first = torch.ones_like(ordered, dtype=torch.int64)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(order).scatter(0, order, first.cumsum(0) - 1), groups.shape[0]


def group_moments(values: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (G,) mean, standard deviation (over n - 1; 0 where values do not differ) and size of each group."""
    wide = values.double()
    zeros = wide.new_zeros(count)
    size = zeros.index_add(0, index, torch.ones_like(wide))
    mean = zeros.index_add(0, index, wide) / size.clamp(min=1)
    squares = zeros.index_add(0, index, (wide - mean[index]).square())
    largest = zeros.scatter_reduce(0, index, wide.abs(), "amax")
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    std = torch.where(std <= _NOISE * largest, 0.0, std)  # NaN stays NaN
    return mean.to(values.dtype), std.to(values.dtype), size.to(values.dtype)


def _reinforce(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """R: no baseline (Williams 1992)."""
    return rewards


def _centred(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """R - mean of the group, as GRPO without its standard deviation (Dr. GRPO, arXiv 2503.20783)."""
    mean, std, _ = group_moments(rewards, index, count)
    return torch.where(std[index] == 0, 0.0, rewards - mean[index])


def _rloo(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """R - mean of the others in the group = n / (n - 1) * (R - mean) (RLOO, arXiv 2402.14740)."""
    _, _, size = group_moments(rewards, index, count)
    return _centred(rewards, index, count) * (size / (size - 1).clamp(min=1))[index]


def _grpo(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """(R - mean) / (std + 1e-4) within the group (GRPO, arXiv 2402.03300; the constant is TRL's)."""
    _, std, _ = group_moments(rewards, index, count)
    return _centred(rewards, index, count) / (std[index] + EPSILON)


def _reinforce_pp(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """(R - mean) / (std + 1e-4) over the whole batch (REINFORCE++, arXiv 2501.03262)."""
    return _grpo(rewards, torch.zeros_like(index), 1)


def _reinforce_pp_baseline(rewards: Tensor, index: Tensor, count: int) -> Tensor:
    """R - mean of the group, standardised over the whole batch (REINFORCE++ with baseline, arXiv 2501.03262)."""
    return _reinforce_pp(_centred(rewards, index, count), index, count)


BASELINES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "reinforce": _reinforce,
    "rloo": _rloo,
    "grpo": _grpo,
    "dr_grpo": _centred,
    "reinforce++": _reinforce_pp,
    "reinforce++_baseline": _reinforce_pp_baseline,
}

UNGROUPED = ("reinforce", "reinforce++")


def outcome_advantages(rewards: Tensor, name: str = "rloo", *, groups: Tensor | None = None) -> Tensor:
    """Compute the advantage of each sequence from its outcome reward R and the rewards of its group.

        reinforce             R                                          Williams 1992
        rloo                  R - mean of the others in the group        arXiv 2402.14740
        grpo                  (R - mean) / (std + 1e-4) in the group     arXiv 2402.03300; the constant is TRL's
        dr_grpo               R - mean of the group                      arXiv 2503.20783
        reinforce++           (R - mean) / (std + 1e-4) in the batch     arXiv 2501.03262
        reinforce++_baseline  R - mean of the group, then reinforce++    arXiv 2501.03262

    Nothing waits for a device. The standard deviation has n - 1 in its denominator. A group of one, and rewards that do
    not differ, have advantage 0 (except for "reinforce"). A reward that is not finite makes its whole group, or the
    batch, not finite.

    Args:
        rewards: (B,) float: the outcome of each sequence.
        name: the baseline, one of `BASELINES`.
        groups: (B,) int: the question that each sequence answers, any ids in any order. Needed except for "reinforce"
            and "reinforce++", which ignore it.

    Returns:
        (B,) advantages, detached, in float32, or in float64 if the rewards are float64.

    Raises:
        ValueError: if the name is unknown, or a shape or device does not fit.
        TypeError: if an argument has the wrong type, or `groups` is missing.

    Examples:
        >>> outcome_advantages(torch.tensor([1.0, 0.0, 0.0]), "dr_grpo", groups=torch.tensor([7, 7, 3]))
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    check_choice("name", name, tuple(BASELINES))
    check_float("rewards", rewards, ndim=1)
    rewards = rewards.detach() if rewards.dtype == torch.float64 else rewards.detach().float()
    if name in UNGROUPED:
        return BASELINES[name](rewards, torch.zeros_like(rewards, dtype=torch.int64), 1)
    if groups is None:
        raise TypeError(f"groups: expected (B,) ids for {name!r}, got None")
    check_integer("groups", groups)
    check_shape("groups", groups, tuple(rewards.shape))
    check_device("groups", groups, rewards.device, "rewards")
    return BASELINES[name](rewards, *group_index(groups))


COMBINE = ("add", "multiply", "replace")


def combine_advantages(
    step_advantages: Tensor,
    outcome_advantages: Tensor,
    step_sequence: Tensor,
    how: str = "add",
    *,
    step_scale: float = 1.0,
    outcome_scale: float = 1.0,
) -> Tensor:
    """Combine the advantages of steps and of outcomes to one advantage for each step.

        add       outcome_scale * A_outcome + step_scale * A_step
        multiply  outcome_scale * A_outcome * step_scale * A_step
        replace   step_scale * A_step

    "multiply" is for step signals that are weights, 0 and above: the product of two negative advantages would be
    positive. How the SSPO paper combines them is not public: this is our reconstruction.

    Args:
        step_advantages: (S,) float.
        outcome_advantages: (B,) float on the same device.
        step_sequence: (S,) int on the same device: the sequence of each step (`StepLayout.step_sequence`).
        how: "add", "multiply" or "replace".
        step_scale: factor of the step advantages.
        outcome_scale: factor of the outcome advantages.

    Returns:
        (S,) advantages, detached.

    Raises:
        ValueError: if `how` is unknown, a shape or device does not fit, or (on the CPU) `step_sequence` names a
            sequence that is not there.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> combine_advantages(torch.tensor([0.5, 0.25]), torch.tensor([1.0]), torch.tensor([0, 0]))
        tensor([1.5000, 1.2500])
    """
    check_combination(how, step_scale, outcome_scale)
    check_float("step_advantages", step_advantages, ndim=1)
    check_float("outcome_advantages", outcome_advantages, ndim=1)
    check_integer("step_sequence", step_sequence)
    check_shape("step_sequence", step_sequence, tuple(step_advantages.shape))
    device = step_advantages.device
    for name, tensor in (("outcome_advantages", outcome_advantages), ("step_sequence", step_sequence)):
        check_device(name, tensor, device, "step_advantages")
    if device.type == "cpu" and len(step_sequence):  # on a device the indexing asserts by itself
        low, high = step_sequence.aminmax()
        if low < 0 or high >= len(outcome_advantages):
            raise ValueError(
                f"step_sequence: expected numbers of the {len(outcome_advantages)} sequences, got "
                f"{int(low) if low < 0 else int(high)}"
            )
    outcome = outcome_advantages.detach()[step_sequence.long()]
    return combined(step_advantages.detach(), outcome, how, step_scale, outcome_scale)


def check_combination(how: str, step_scale: float, outcome_scale: float) -> None:
    """TypeError or ValueError unless the options of `combine_advantages` are such."""
    check_choice("how", how, COMBINE)
    for name, value in (("step_scale", step_scale), ("outcome_scale", outcome_scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {describe(value)}")


def combined(step: Tensor, outcome: Tensor, how: str, step_scale: float, outcome_scale: float) -> Tensor:
    """Combine advantages of steps with those of their sequences' outcomes, of shapes that broadcast."""
    step = step_scale * step
    if how == "replace":
        return step
    return outcome_scale * outcome + step if how == "add" else outcome_scale * outcome * step
