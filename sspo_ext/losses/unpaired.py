# SPDX-License-Identifier: Apache-2.0
"""Losses of single responses with a thumb up or down: KTO, and APO-zero without pairs.

The reference point, which depends on the whole batch, is an argument. Nothing is remembered between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_not_negative, check_positive, check_shape, describe
from ..layout.steps import StepLayout
from ..objective.sums import StepLogps
from .common import StepLossOutput, all_reduce, log_ratios, loss_function, masked_mean, reduce_units


def kto_reference_point(
    logps: StepLogps,
    layout: StepLayout,
    ref: StepLogps | Tensor,
    *,
    group=None,
) -> Tensor:
    """KTO's z0 = max(0, mean log-ratio of mismatched completions), detached.

    KTO pairs each prompt with another prompt's completion. Build a layout of those sequences and pass their log-probs.

    Args:
        logps: StepLogps of the mismatched completions.
        layout: the StepLayout that made them.
        ref: the reference on the same sequences, as in `step_pref_loss`.
        group: data-parallel ranks over which to average; None: this rank alone.

    Returns:
        () float.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A shape or device does not fit.

    Examples:
        >>> ref = step_logps(torch.randn_like(logits), layout)
        >>> z0 = kto_reference_point(step_logps(logits, layout), layout, ref)
    """
    u = log_ratios(logps, layout, ref, "the reference point").detach()
    valid = layout.counts > 0
    total, count = torch.where(valid, u, torch.zeros_like(u)).sum(), valid.sum().to(u.dtype)
    total, count = all_reduce(torch.stack([total, count]), group)
    return (total / count.clamp(min=1)).clamp(min=0)


@loss_function(
    "kto",
    formula="desirable: w_D (1 - sig(beta (u - z0))); undesirable: w_U (1 - sig(beta (z0 - u)))",
    source="KTO (arXiv 2402.01306), eq. 7, as TRL's KTOTrainer; z0 = `kto_reference_point(...)`",
    use="single responses with a thumb up or down, no pairs",
    unit="step",
    needs="desirable (S,) bool, reference, z0",
)
def kto_loss(
    logps: StepLogps,
    layout: StepLayout,
    desirable: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    reference_point: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """KTO over steps with tokens; with one step a sequence, over sequences.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        desirable: (S,) bool.
        ref: the reference, as in `step_pref_loss`. KTO needs one.
        reference_point: () z0 of `kto_reference_point`, a constant.
        beta: reward scale.
        desirable_weight: factor on the losses of desirable steps.
        undesirable_weight: factor on the losses of the other steps.
        reduction: 'mean' over steps with tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (S,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> logps, ref = step_logps(logits, layout), step_logps(torch.randn_like(logits), layout)
        >>> desirable = torch.arange(layout.num_steps) % 2 == 0
        >>> kto_loss(logps, layout, desirable, ref=ref, reference_point=0.1).loss.backward()
    """
    u, sign = _unpaired(logps, layout, desirable, ref, beta, "KTO")
    if isinstance(reference_point, Tensor):
        check_shape("reference_point", reference_point, ())
        reference_point = reference_point.detach().to(u.dtype)
    losses = torch.sigmoid(-beta * sign * (u - reference_point))
    return _unpaired_output(
        losses, u, layout, desirable, beta, desirable_weight, undesirable_weight, reduction, num_items
    )


@loss_function(
    "apo_zero_unpaired",
    formula="desirable: w_D (1 - sig(beta u)); undesirable: w_U sig(beta u)",
    source="APO-zero (arXiv 2408.06266) without pairs, as TRL's KTOTrainer: KTO with z0 = 0",
    use="as kto, without the extra forward for z0",
    unit="step",
    needs="desirable (S,) bool, reference",
)
def apo_zero_unpaired_loss(
    logps: StepLogps,
    layout: StepLayout,
    desirable: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """APO-zero over single steps with tokens.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        desirable: (S,) bool.
        ref: the reference, as in `step_pref_loss`. APO needs one.
        beta: reward scale.
        desirable_weight: factor on the losses of desirable steps.
        undesirable_weight: factor on the losses of the other steps.
        reduction: 'mean' over steps with tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (S,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> logps, ref = step_logps(logits, layout), step_logps(torch.randn_like(logits), layout)
        >>> apo_zero_unpaired_loss(logps, layout, torch.arange(layout.num_steps) % 2 == 0, ref=ref).loss.backward()
    """
    u, sign = _unpaired(logps, layout, desirable, ref, beta, "APO")
    return _unpaired_output(
        torch.sigmoid(-beta * sign * u), u, layout, desirable, beta, desirable_weight, undesirable_weight, reduction,
        num_items,
    )  # fmt: skip


def _unpaired(
    logps: StepLogps,
    layout: StepLayout,
    desirable: Tensor,
    ref: StepLogps | Tensor | None,
    beta: float,
    who: str,
) -> tuple[Tensor, Tensor]:
    """Log-ratios u (S,), and a sign (S,): 1 for desirable steps, -1 for others."""
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref, who)
    check_shape("desirable", desirable, (layout.num_steps,))
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable: expected a bool tensor, got {describe(desirable)}")
    return u, torch.where(desirable, 1.0, -1.0).to(u.dtype)


def _unpaired_output(
    losses: Tensor,
    u: Tensor,
    layout: StepLayout,
    desirable: Tensor,
    beta: float,
    weight: float,
    other: float,
    reduction: str,
    num_items: float | Tensor | None,
) -> StepLossOutput:
    """The loss with `weight` on desirable steps and `other` on the rest."""
    check_not_negative("desirable_weight", weight)
    check_not_negative("undesirable_weight", other)
    valid = layout.counts > 0
    losses = torch.where(desirable, weight * losses, other * losses)
    loss, losses = reduce_units(losses, valid, None, reduction, num_items)
    rewards = beta * u.detach()
    metrics = {
        "rewards/chosen": masked_mean(rewards, valid & desirable),
        "rewards/rejected": masked_mean(rewards, valid & ~desirable),
    }
    return StepLossOutput(loss, losses.detach(), rewards, metrics)
