# SPDX-License-Identifier: Apache-2.0
"""The advantages of steps on padded tensors (B, T), as engines keep them: on the device, without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_device, check_float, check_integer, check_shape, describe
from ..values import StepValues
from .baselines import check_combination, combined, group_index
from .gae import check_discounts, check_normalize, discounted_sums, over_deviation, standardised


def step_gae_tokens(
    values: StepValues | Tensor,
    rewards: Tensor,
    step_ids: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    normalize: str = "none",
    groups: Tensor | None = None,
) -> Tensor:
    """Compute `step_gae` on padded tensors: each token gets the advantage of its step.

    The value before a step stands at the step's first token, as a critic writes it there. So the values of K steps are
    V_0, ..., V_{K-1}, and V_K, which is 0 by definition, needs no place. The numbers are those of `step_gae`, token by
    token. The work is log2(T) passes over (B, T), without synchronisation.

    Args:
        values: (B, T) float, read at the first token of each step: the value of everything before it. Or StepValues,
            whose sequences are the rows.
        rewards: (B,) float: the outcome R of each sequence, received at its last step. Or (B, T): rewards of tokens; a
            step gets those of its tokens and of the unscored ones after it (a tool's output, the padding).
        step_ids: (B, T) int on the same device: never decreasing along a sequence, -1 where nothing is scored. An id
            without a token is no step.
        gamma: discount of one step, in [0, 1].
        lam: lambda of GAE, in [0, 1].
        normalize: as in `step_gae`, over steps and not over tokens.
        groups: (B,) int for "group", and only there.

    Returns:
        (B, T) advantages, detached, 0 where nothing is scored, in float32, or in float64 if the values are float64.

    Raises:
        ValueError: if a shape, device or range does not fit, or `groups` is given without "group" or missing with it.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> step_ids = torch.tensor([[-1, 0, 0, 1, -1]])
        >>> values = torch.tensor([[9.0, 0.25, 9.0, 0.5, 9.0]])
        >>> step_gae_tokens(values, torch.tensor([1.0]), step_ids, lam=0.0)
        tensor([[0.0000, 0.2500, 0.2500, 0.5000, 0.0000]])
    """
    check_discounts(gamma, lam)
    check_normalize(normalize, groups)
    _check(values, rewards, step_ids, groups)
    steps = _Steps(step_ids)
    if isinstance(values, StepValues) and step_ids.device.type == "cpu":
        counts = steps.there.sum(1)
        if (counts != values.steps_per_sequence).any():
            raise ValueError(
                f"values: expected those of {counts.tolist()} steps, one sequence after the other, got those of "
                f"{values.steps_per_sequence.tolist()}"
            )
    before = steps.at_start(_before(values, steps))
    zero = before.new_zeros(())
    after = torch.cat([before[:, 1:], before.new_zeros(len(before), 1)], 1)
    rewards = rewards.detach().to(before.dtype)
    if rewards.ndim == 1:
        delta = torch.where(steps.last, rewards[:, None], gamma * after) - before
    else:
        delta = torch.where(steps.last, zero, gamma * after) - before + steps.at_start(steps.sums(rewards))
    delta = torch.where(steps.there, delta, zero)
    batch, length = step_ids.shape
    sequence = torch.arange(batch, device=delta.device).repeat_interleave(length, output_size=batch * length)
    advantage = discounted_sums(delta.reshape(-1), sequence, gamma * lam, length)
    if normalize != "none":
        # what is no step goes into a group of its own
        there = steps.there.reshape(-1)
        if groups is None:
            advantage = over_deviation(advantage, (~there).long(), 2)
        else:
            index, count = group_index(groups.to(delta.device))
            advantage = standardised(advantage, torch.where(there, index[sequence], count), count + 1)
    return steps.spread(advantage.view(batch, length))


def steps_to_tokens(per_step: Tensor, step_ids: Tensor) -> Tensor:
    """Give each token the number of its step.

    Args:
        per_step: (S,) float, the steps of sequence 0, then of sequence 1, ..., as a StepLayout numbers them; or (B, K),
            step k of each sequence in column k.
        step_ids: (B, T) int on the same device: never decreasing along a sequence, -1 where nothing is scored.

    Returns:
        (B, T), 0 where nothing is scored; differentiable in `per_step`. On the device, without synchronisation.

    Raises:
        ValueError: if a shape or device does not fit, or (on the CPU) a step is not there.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> steps_to_tokens(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 0, 1], [-1, 0, -1]]))
        tensor([[1., 1., 2.],
                [0., 3., 0.]])
    """
    check_float("per_step", per_step, ndim=(1, 2))
    check_integer("step_ids", step_ids, ndim=2)
    check_device("step_ids", step_ids, per_step.device, "per_step")
    at, ids = step_ids.clamp(min=0).long(), step_ids.long()
    if per_step.ndim == 2:
        check_shape("per_step", per_step, (len(step_ids), per_step.shape[1]))
        needed = ids.amax() + 1 if ids.numel() and ids.device.type == "cpu" else 0
        size = per_step.shape[1]
    else:
        number = torch.nn.functional.pad(ids, (1, 0), value=-1).amax(1) + 1
        at = at + (number.cumsum(0) - number)[:, None]
        needed, size = number.sum() if ids.device.type == "cpu" else 0, per_step.shape[0]
    if needed > size:
        raise ValueError(f"per_step: expected numbers of {int(needed)} steps, got {describe(per_step)}")
    if not size:
        return per_step.new_zeros(step_ids.shape)
    found = per_step.gather(1, at) if per_step.ndim == 2 else per_step[at.clamp(max=size - 1)]
    return torch.where(ids >= 0, found, found.new_zeros(()))


def combine_advantages_tokens(
    step_advantages: Tensor,
    outcome_advantages: Tensor,
    step_ids: Tensor,
    how: str = "add",
    *,
    step_scale: float = 1.0,
    outcome_scale: float = 1.0,
) -> Tensor:
    """Combine advantages on padded tensors, as `combine_advantages` does.

    Args:
        step_advantages: (B, T) float, of `step_gae_tokens`.
        outcome_advantages: (B,) float on the same device.
        step_ids: (B, T) int on the same device, -1 where nothing is scored.
        how: "add", "multiply" or "replace", as in `combine_advantages`.
        step_scale: factor of the step advantages.
        outcome_scale: factor of the outcome advantages.

    Returns:
        (B, T) advantages, detached, 0 where nothing is scored. On the device, without synchronisation.

    Raises:
        ValueError: if `how` is unknown, or a shape or device does not fit.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> combine_advantages_tokens(torch.tensor([[0.5, 0.0]]), torch.tensor([1.0]), torch.tensor([[0, -1]]))
        tensor([[1.5000, 0.0000]])
    """
    check_combination(how, step_scale, outcome_scale)
    check_float("step_advantages", step_advantages, ndim=2)
    check_float("outcome_advantages", outcome_advantages)
    check_shape("outcome_advantages", outcome_advantages, (len(step_advantages),))
    check_integer("step_ids", step_ids)
    check_shape("step_ids", step_ids, tuple(step_advantages.shape))
    for name, tensor in (("outcome_advantages", outcome_advantages), ("step_ids", step_ids)):
        check_device(name, tensor, step_advantages.device, "step_advantages")
    outcome = outcome_advantages.detach()[:, None]
    found = combined(step_advantages.detach(), outcome, how, step_scale, outcome_scale)
    return torch.where(step_ids >= 0, found, found.new_zeros(()))


class _Steps:
    """Steps that have tokens, numbered 0, 1, 2, ... along each sequence. A grid (B, T) has step k in column k."""

    def __init__(self, step_ids: Tensor):
        self.scored = step_ids >= 0
        running = step_ids.long().cummax(1).values
        starts = running > torch.nn.functional.pad(running[:, :-1], (1, 0), value=-1)
        self.number = starts.long().cumsum(1) - 1  # of the step that a token belongs to or follows; -1 before the first
        column = torch.arange(step_ids.shape[1], device=step_ids.device).expand(step_ids.shape).contiguous()
        self.first = torch.searchsorted(self.number, column).clamp(max=max(step_ids.shape[1] - 1, 0))
        steps = torch.nn.functional.pad(self.number, (1, 0), value=-1)[:, -1:] + 1  # (B, 1): of each sequence
        self.there, self.last = column < steps, column == steps - 1

    def at_start(self, tokens: Tensor) -> Tensor:
        """From values of tokens, the grid of those at each step's first token; 0 where there is no step."""
        return torch.where(self.there, tokens.gather(1, self.first), tokens.new_zeros(()))

    def sums(self, tokens: Tensor) -> Tensor:
        """(B, T): at each token, the sum of its step's values from there on."""
        batch, length = tokens.shape
        run = self.number + torch.arange(batch, device=tokens.device)[:, None] * (length + 1)
        return discounted_sums(tokens.reshape(-1), run.reshape(-1), 1.0, length).view(batch, length)

    def spread(self, grid: Tensor) -> Tensor:
        """(B, T): each scored token's step of a grid, 0 elsewhere."""
        return torch.where(self.scored, grid.gather(1, self.number.clamp(min=0)), grid.new_zeros(()))


def _before(values: StepValues | Tensor, steps: _Steps) -> Tensor:
    """(B, T): at each step's first token, the value of what is before."""
    if isinstance(values, Tensor):
        return values.detach() if values.dtype == torch.float64 else values.detach().float()
    at = values.offsets[:-1, None] + steps.number.clamp(min=0)
    return values.values[at.clamp(max=max(len(values.values) - 1, 0))]


def _check(values: StepValues | Tensor, rewards: Tensor, step_ids: Tensor, groups: Tensor | None) -> None:
    check_integer("step_ids", step_ids, ndim=2)
    batch, device = len(step_ids), step_ids.device
    if isinstance(values, StepValues):
        if values.num_sequences != batch:
            raise ValueError(f"values: expected those of {batch} sequences, got {values.num_sequences}")
        values = values.values
    else:
        if not isinstance(values, Tensor):
            raise TypeError(f"values: expected (B, T) values or a StepValues, got {describe(values)}")
        check_float("values", values)
        check_shape("values", values, tuple(step_ids.shape))
    check_device("values", values, device, "step_ids")
    check_float("rewards", rewards, ndim=(1, 2))
    check_shape("rewards", rewards, (batch,) if rewards.ndim == 1 else tuple(step_ids.shape))
    check_device("rewards", rewards, device, "step_ids")
    if groups is not None:
        check_integer("groups", groups)
        check_shape("groups", groups, (batch,))
