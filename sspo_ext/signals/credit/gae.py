# SPDX-License-Identifier: Apache-2.0
"""Generalised advantage estimation (GAE) over steps instead of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_choice, check_device, check_float, check_integer, check_shape, describe
from ..values import StepValues
from .baselines import group_index, group_moments

NORMALIZE = ("none", "batch", "group")


def step_gae(
    values: StepValues,
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    step_rewards: Tensor | None = None,
    normalize: str = "none",
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the advantage of each step by GAE over the steps of its sequence.

    With K steps, rewards r_k and values V_k:

        delta_k = r_k + gamma * V_k - V_{k-1}        r_k = step_rewards_k, plus R for k = K;  V_K := 0 (terminal)
        A_k     = delta_k + gamma * lam * A_{k+1}

    lam = 0 is one-step progress, V_k - V_{k-1} at gamma = 1. gamma = lam = 1 is R - V_{k-1}. Source: Schulman et al.
    2015, arXiv 1506.02438, on a chain of steps. Which values and discounts the SSPO paper uses is not public: this is
    our reconstruction.

    The computation takes log2(longest K) passes over vectors of S numbers, without synchronisation. A NaN makes the
    advantages of its sequence NaN, and with `normalize` those of its batch or group.

    Args:
        values: V_0, ..., V_K of each sequence.
        rewards: (B,) float on the values' device: the outcome R of each sequence, received at its last step.
        gamma: discount of one step, in [0, 1].
        lam: lambda of GAE, in [0, 1].
        step_rewards: (S,) float: a reward of each step itself (shaping), or None.
        normalize: how advantages are scaled.

            * "none": not at all.
            * "batch": divided by the standard deviation over all steps, or by half the absolute mean where that is
              larger, so that steps which hardly differ are not blown up. The mean is not subtracted: a mean below zero
              is what makes redundant steps unattractive. Steps that do not differ stay as they are.
            * "group": standardised over the steps of each group, as in GRPO's process supervision (arXiv 2402.03300).
              Steps that do not differ become 0.
        groups: (B,) int for "group", and only there: the question that each sequence answers, any ids in any order.

    Returns:
        (S,) advantages, detached, in float32, or in float64 if the values are float64.

    Raises:
        ValueError: if a shape, device or range does not fit, or `groups` is given without "group" or missing with it.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> values = StepValues.from_lists([[0.25, 0.5, 0.75]])
        >>> step_gae(values, torch.tensor([1.0]), gamma=1.0, lam=0.0)
        tensor([0.2500, 0.5000])
    """
    _check(values, rewards, gamma, lam, step_rewards, normalize, groups)
    v = values.values
    sequence, length = values.step_sequence, values.num_steps
    # A sequence has one value more than steps, so step j of the batch starts from value j + (number of its sequence).
    before = torch.arange(length, device=v.device) + sequence
    last = torch.ones(length, dtype=torch.bool, device=v.device)
    last[:-1] = sequence[1:] != sequence[:-1]
    outcome = rewards.detach().to(v.dtype)[sequence]
    advantage = torch.where(last, outcome, gamma * v[before + 1]) - v[before]
    if step_rewards is not None:
        advantage = advantage + step_rewards.detach().to(v.dtype)

    # Doubling: after the pass with this shift, a step has the discounted sum of the next 2 * shift deltas.
    shift, longest = 1, int(values.steps_per_sequence.max()) if values.num_sequences else 0
    while shift < longest:
        same = sequence[shift:] == sequence[:-shift]
        later = torch.where(same, advantage[shift:], 0.0) * (gamma * lam) ** shift
        advantage = torch.cat([advantage[:-shift] + later, advantage[-shift:]])
        shift *= 2

    if normalize == "none" or not length:
        return advantage
    if groups is not None:
        check_integer("groups", groups)
        check_shape("groups", groups, (values.num_sequences,))
    return _normalized(advantage, sequence, groups)


def spread(advantage: Tensor) -> Tensor:
    """Compute what `normalize="batch"` divides by, (1,): the standard deviation, or half the absolute mean if larger.

    On the scale of the rewards it says how much the steps of a batch, (S,), have to tell.
    """
    return _std_and_spread(advantage)[1]


def _std_and_spread(advantage: Tensor) -> tuple[Tensor, Tensor]:
    mean, std, _ = group_moments(advantage, torch.zeros_like(advantage, dtype=torch.int64), 1)
    return std, torch.maximum(std, mean.abs() / 2)


def _normalized(advantage: Tensor, sequence: Tensor, groups: Tensor | None) -> Tensor:
    """Scale advantages over the batch, or with `groups` (B,) over the steps of each group."""
    if groups is None:
        std, scale = _std_and_spread(advantage)
        return torch.where(std == 0, advantage, advantage / scale)
    index, count = group_index(groups.to(advantage.device))
    index = index[sequence]
    mean, std, _ = group_moments(advantage, index, count)
    return torch.where(std[index] == 0, 0.0, (advantage - mean[index]) / std[index])


def _check(
    values: StepValues,
    rewards: Tensor,
    gamma: float,
    lam: float,
    step_rewards: Tensor | None,
    normalize: str,
    groups: Tensor | None,
) -> None:
    if not isinstance(values, StepValues):
        raise TypeError(f"values: expected a StepValues, got {describe(values)}; StepValues.from_lists(...) builds one")
    check_float("rewards", rewards)
    check_shape("rewards", rewards, (values.num_sequences,))
    check_device("rewards", rewards, values.values.device, "values")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {describe(value)}")
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    check_choice("normalize", normalize, NORMALIZE)
    if (groups is not None) != (normalize == "group"):
        raise ValueError(f"groups: expected with normalize='group' and only there, got {describe(groups)}")
    if step_rewards is not None:
        check_float("step_rewards", step_rewards)
        check_shape("step_rewards", step_rewards, (values.num_steps,))
        check_device("step_rewards", step_rewards, values.values.device, "values")
