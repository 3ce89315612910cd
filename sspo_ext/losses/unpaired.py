"""Losses of more than a pair at a time: unpaired (KTO), sorted over the batch (AOT), listwise, with a third response.

What depends on the whole batch is explicit: a reference point or a running mean is passed in and comes back, and
`group=` names the data-parallel ranks it is taken over. Nothing is remembered between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_not_negative, check_positive, check_shape, describe
from ..layout.steps import StepLayout
from ..objective.sums import StepLogps
from .common import StepLossOutput, all_reduce, log_ratios, loss_function, masked_mean, reduce_units


def kto_reference_point(
    logps: StepLogps,  # of the mismatched completions
    layout: StepLayout,
    ref: StepLogps | Tensor,
    *,
    group=None,
) -> Tensor:
    """(): KTO's z0 = max(0, mean log-ratio of mismatched completions), detached; a mean over all ranks of `group`.

    KTO pairs each prompt with another prompt's completion. Build a layout of those sequences and pass their log-probs.
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
    desirable: Tensor,  # (S,) bool
    *,
    ref: StepLogps | Tensor | None = None,
    reference_point: Tensor | float = 0.0,  # () z0, a constant
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """KTO over steps with tokens (sequences, with one step each).

    Example::

        >>> z0 = kto_reference_point(step_logps(mismatched_logits, other), other, mismatched_ref)
        >>> kto_loss(step_logps(logits, layout), layout, desirable, ref=ref, reference_point=z0).loss.backward()
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
    desirable: Tensor,  # (S,) bool
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """APO-zero over single steps with tokens."""
    u, sign = _unpaired(logps, layout, desirable, ref, beta, "APO")
    return _unpaired_output(
        torch.sigmoid(-beta * sign * u), u, layout, desirable, beta, desirable_weight, undesirable_weight, reduction,
        num_items,
    )  # fmt: skip


def _unpaired(logps, layout: StepLayout, desirable: Tensor, ref, beta: float, who: str) -> tuple[Tensor, Tensor]:
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref, who)
    check_shape("desirable", desirable, (layout.num_steps,))
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable: expected a bool tensor, got {describe(desirable)}")
    return u, torch.where(desirable, 1.0, -1.0).to(u.dtype)


def _unpaired_output(
    losses, u: Tensor, layout: StepLayout, desirable: Tensor, beta: float, weight: float, other: float, reduction: str,
    num_items,
) -> StepLossOutput:  # fmt: skip
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
