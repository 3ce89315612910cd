# SPDX-License-Identifier: Apache-2.0
"""Steps where an engine carries none: advantages and values of tokens tell where they begin."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..layout.steps import StepLayout
from ..losses.correction import rollout_correction
from ..losses.from_logps import policy_loss
from ..losses.policy import StepPolicyOutput


def steps_of_values(values: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Step ids (B, T), -1 outside the mask, and values at every token, from values that are NaN but at steps' starts.

    A step may start at a token outside the mask (a tool's output): its value stands at its first token inside, too.
    """
    starts = ~values.isnan()
    place = torch.arange(values.shape[1], device=values.device)
    filled = values.gather(1, torch.where(starts, place, 0).cummax(1).values)
    return torch.where(response_mask.bool(), starts.long().cumsum(1) - 1, -1), filled.nan_to_num()


def apart(advantages: Tensor, step_ids: Tensor) -> Tensor:
    """Advantages in which neighbouring steps differ, by one unit in the last place at least: the loss sees no step ids.

    Of two neighbours with equal advantages the odd one moves up.
    """
    scored = step_ids >= 0
    starts = scored & (step_ids != _before(step_ids, scored))
    number = starts.long().cumsum(1)
    tie = starts & (advantages == _before(advantages, scored))
    tied = torch.zeros_like(number).scatter_reduce(1, number, tie.long(), "amax")  # a step and the one before it
    tied = tied + torch.nn.functional.pad(tied[:, 1:], (0, 1))
    moved = torch.nextafter(advantages, torch.full_like(advantages, float("inf")))
    return torch.where(scored & (number % 2 == 1) & (tied.gather(1, number) > 0), moved, advantages)


def _before(values: Tensor, scored: Tensor) -> Tensor:
    """(B, T): at each token the value of the last scored token before it; its own where there is none."""
    place = torch.arange(values.shape[1], device=values.device)
    last = torch.where(scored, place, -1).cummax(1).values
    previous = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return torch.where(previous >= 0, values.gather(1, previous.clamp(min=0)), values)


def step_ids_from_advantages(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T): a step is a run of equal advantages; -1 outside the mask."""
    scored = response_mask.bool()
    starts = scored & (advantages != _before(advantages, scored))
    return torch.where(scored, starts.long().cumsum(1), -1)


ON: Mapping[str, Any] = MappingProxyType({})  # a correction with the defaults of `rollout_correction`


def policy_loss_at(
    level: str,
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    step_ids: Tensor | None = None,
    rollout: Tensor | None = None,
    correction: Mapping[str, Any] | None = None,
    **options,
) -> StepPolicyOutput:
    """`policy_loss` of (B, T) tensors with a clipped ratio at this level; steps are runs of equal advantages.

    `options` are those of `policy_loss`. With log-probs of the `rollout` and a `correction` (options of
    `rollout_correction`) the loss has importance weights, and the output's metrics are also the correction's.
    """
    if step_ids is None:
        step_ids = step_ids_from_advantages(advantages, mask)
    given: dict[str, Any] = {"loss_type": "ppo", **options}
    layout, found = StepLayout.from_response(mask, step_ids), None
    if rollout is not None and correction is not None:
        found = rollout_correction(old, rollout, layout, **correction)
        given["importance_weights"] = found.weights
    out = policy_loss(logps, layout, advantages, old=old, importance_sampling_level=level, **given)
    if found is not None:
        out.metrics.update(found.metrics)
    return out
