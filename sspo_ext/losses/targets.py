# SPDX-License-Identifier: Apache-2.0
"""Losses that fit steps to targets: given values or advantages, or the outcome itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_not_negative, check_positive, check_shape
from ..formulas.numerics import logistic
from ..layout.steps import StepLayout
from ..objective.sums import StepLogps
from .common import (
    StepGrid,
    StepLossOutput,
    log_ratios,
    loss_function,
    masked_mean,
    optional_log_ratios,
    per_unit,
    reduce_units,
)


@loss_function(
    "direct_advantage",
    formula="(u_k - A_k / beta)^2 / 2",
    source="Direct Advantage Policy Optimization (arXiv 2412.18279), its squared step loss; the exact scaling is read "
    "from a summary, not from the authors' code. With targets of beta u_k instead of advantages: DVO (2502.13723)",
    use="advantages of steps from a frozen critic, no pairs",
    unit="step",
    needs="advantages (S,)",
)
def direct_advantage_loss(
    logps: StepLogps,
    layout: StepLayout,
    advantages: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    beta: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Squared distance of each step's log-ratio to its scaled advantage, over steps with tokens.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        advantages: (S,) float, constants.
        ref: the reference, as in `step_pref_loss`.
        reference_free: as in `step_pref_loss`.
        beta: reward scale.
        weights: (S,) multiply the steps' losses.
        reduction: 'mean' over steps with tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (S,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> direct_advantage_loss(step_logps(logits, layout), layout, advantages, reference_free=True).loss.backward()
    """
    check_positive("beta", beta)
    u = optional_log_ratios("direct_advantage_loss", logps, layout, ref, reference_free)
    target = per_unit("advantages", advantages, layout.num_steps, u) / beta
    valid = layout.counts > 0
    loss, losses = reduce_units(0.5 * torch.square(u - target), valid, weights, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach(), {"rewards/mean": masked_mean(beta * u, valid)})


@loss_function(
    "oreo",
    formula="(sg V_k - R + beta (u_k + sg sum_{j>k} u_j))^2 + kl_coef mean_t KL_t",
    source="OREO (arXiv 2412.16145), eq. 9, its step-level variant, with the paper's beta. The paper regularises by "
    "KL(pi || ref), by 0.01 for tokens and 0.1 for steps, as its authors' scripts do, and averages in each sequence "
    "first: pass that divergence as `kl=`, since `StepLogps.kl` is KL(ref || pi)",
    use="offline multi-step reasoning with a value per step and an outcome",
    unit="step",
    needs="values (S,), outcome rewards (B,), reference; `kl=` or `StepLogps.kl` where kl_coef is not 0",
)
def oreo_loss(
    logps: StepLogps,
    layout: StepLayout,
    values: Tensor,
    rewards: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.03,
    kl_coef: float = 0.0,
    kl: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """OREO's policy loss: each step's log-ratio explains what value, outcome and later steps leave unexplained.

    With kl_coef, the mean of a divergence over this batch's scored tokens is added. The paper's is KL(pi || ref), which
    no fused reduction computes: pass it as `kl`, at the cost of an (N, V) of your own. Without `kl` the divergence is
    `logps.kl`, KL(ref || pi), of log-probs made with `kl_ref_logits=` (or `kl_ref_hidden=`).

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        values: (S,) float, constants: V of the state in which step k begins.
        rewards: (B,) float: the outcome of each sequence.
        ref: the reference, as in `step_pref_loss`. OREO needs one.
        beta: reward scale.
        kl_coef: weight of the divergence.
        kl: (N,) float: a divergence of each scored token, with gradient.
        reduction: 'mean' over steps with tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (S,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit, or kl_coef is given without a divergence.

    Examples:
        >>> ref_logits, values, rewards = torch.randn_like(logits), torch.zeros_like(advantages), torch.ones(4)
        >>> rows = layout.rows.long()
        >>> p, q = (x.flatten(0, 1)[rows].log_softmax(-1) for x in (logits, ref_logits))
        >>> kl = (p.exp() * (p - q)).sum(-1)
        >>> logps, ref = step_logps(logits, layout), step_logps(ref_logits, layout)
        >>> oreo_loss(logps, layout, values, rewards, ref=ref, kl_coef=0.1, kl=kl).loss.backward()
    """
    u, outcome, grid = _oreo_parts(logps, layout, rewards, ref, beta)
    check_not_negative("kl_coef", kl_coef)
    later = (grid.suffix_sums(u) - u).detach()
    residual = per_unit("values", values, layout.num_steps, u) - outcome + beta * (u + later)
    valid = layout.counts > 0
    loss, losses = reduce_units(torch.square(residual), valid, None, reduction, num_items)
    metrics = {"rewards/mean": masked_mean(beta * u, valid)}
    if kl is not None:
        check_shape("kl", kl, (layout.num_rows,))
    if kl_coef:
        kl = logps.kl if kl is None else kl
        if kl is None:
            raise ValueError("logps: expected .kl beside kl_coef (step_logps(..., kl_ref_logits=)), or kl=, got None")
        mean = kl.to(loss.dtype).sum() / max(layout.num_rows, 1)
        loss = loss + kl_coef * mean
        metrics["kl"] = mean.detach()
    return StepLossOutput(loss, losses.detach(), beta * u.detach(), metrics)


@loss_function(
    "oreo_value",
    formula="(V_k - R + beta sg sum_{j>=k} u_j)^2",
    source="OREO (arXiv 2412.16145), value form",
    use="trains OREO's value model beside the policy",
    unit="step",
    needs="values (S,) with gradient, outcome rewards (B,), reference",
)
def oreo_value_loss(
    logps: StepLogps,
    layout: StepLayout,
    values: Tensor,
    rewards: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.03,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """OREO's critic loss; its gradient goes to `values` alone.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        values: (S,) float: the value model's, with gradient.
        rewards: (B,) float: the outcome of each sequence.
        ref: the reference, as in `step_pref_loss`. OREO needs one.
        beta: reward scale.
        reduction: 'mean' over steps with tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (S,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> values, logps = torch.zeros(layout.num_steps, requires_grad=True), step_logps(logits, layout)
        >>> oreo_value_loss(logps, layout, values, torch.ones(4), ref=step_logps(logits, layout)).loss.backward()
    """
    u, outcome, grid = _oreo_parts(logps, layout, rewards, ref, beta)
    per_unit("values", values, layout.num_steps, u)
    residual = values.to(u.dtype) - outcome + beta * grid.suffix_sums(u.detach())
    loss, losses = reduce_units(torch.square(residual), layout.counts > 0, None, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())


def _oreo_parts(
    logps: StepLogps, layout: StepLayout, rewards: Tensor, ref: StepLogps | Tensor | None, beta: float
) -> tuple[Tensor, Tensor, StepGrid]:
    """Log-ratios u (S,), the outcome (S,) of each step's sequence, and the layout's grid."""
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref, "OREO")
    outcome = per_unit("rewards", rewards, layout.num_sequences, u)[layout.step_sequence.long()]
    return u, outcome, StepGrid(layout)


@loss_function(
    "implicit_prm",
    formula="-R ls(beta U) - (1 - R) ls(-beta U),  U = sum_k u_k of a sequence; step rewards beta u_k",
    source="implicit PRM of PRIME (arXiv 2502.01456); the step rewards of a DPO model: From r to Q* (2404.12358)",
    use="a process reward model from outcomes alone; `.rewards` are the step rewards",
    unit="sequence",
    needs="outcomes (B,) in [0, 1], reference",
)
def implicit_prm_loss(
    logps: StepLogps,
    layout: StepLayout,
    outcomes: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.05,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Cross-entropy of sigmoid(beta * sequence log-ratio) on the outcome, over sequences with scored tokens.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        outcomes: (B,) float in [0, 1].
        ref: the reference, as in `step_pref_loss`. The implicit PRM needs one.
        beta: reward scale.
        weights: (B,) multiply the sequences' losses.
        reduction: 'mean' over sequences with scored tokens, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (B,), `.rewards` (S,) are the step rewards.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref, outcomes = step_logps(torch.randn_like(logits), layout), torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> implicit_prm_loss(step_logps(logits, layout), layout, outcomes, ref=ref).loss.backward()
    """
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref, "the implicit PRM")
    grid = StepGrid(layout)
    target = per_unit("outcomes", outcomes, layout.num_sequences, u)
    total = beta * grid.sequence_sums(u)
    valid = grid.sequence_sums(layout.counts.to(u.dtype)) > 0
    loss, losses = reduce_units(logistic(total, target), valid, weights, reduction, num_items)
    accuracy = masked_mean(((total > 0) == (target > 0.5)).to(u.dtype), valid)
    return StepLossOutput(loss, losses.detach(), beta * u.detach(), {"accuracy": accuracy})
