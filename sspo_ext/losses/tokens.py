# SPDX-License-Identifier: Apache-2.0
"""Losses that look at single tokens or at the whole distribution of each: TDPO, WPO, Full-Step-DPO.

KL and the sum of squared probabilities come with the log-probs: `step_logps(..., kl_ref_logits=)`,
`step_logps(..., sum_p2=True)` and the same of `linear_step_logps`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_not_negative, check_positive, check_shape, check_tensor
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from ..objective.pair_arguments import check_logps, resolve_pairs
from ..objective.sums import StepLogps, sums_over_steps
from .common import (
    StepGrid,
    StepLossOutput,
    log_ratios,
    loss_function,
    masked_mean,
    per_unit,
    reduce_units,
    row_log_ratios,
    unit_numbers,
)


def _tdpo(logps: StepLogps, layout: StepLayout, pairs, ref, beta, weights, reduction, num_items, shift):
    """TDPO with `shift(K_w, K_l)` beside the log-ratios, K the summed divergence of a step."""
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref, "TDPO")
    if logps.kl is None:
        raise ValueError("logps: expected .kl (step_logps(..., kl_ref_logits=)), got None")
    pairs = resolve_pairs(layout, pairs, weights)
    winner, loser = pairs.index.long().unbind(1)
    kl = sums_over_steps(logps.kl, layout)
    z = beta * (u[winner] - u[loser] + shift(kl[winner], kl[loser]))
    loss, losses = reduce_units(-F.logsigmoid(z), pairs.valid, pairs.weights, reduction, num_items)
    metrics = {"kl/chosen": masked_mean(kl[winner], pairs.valid), "kl/rejected": masked_mean(kl[loser], pairs.valid)}
    return StepLossOutput(loss, losses.detach(), beta * u.detach(), metrics)


@loss_function(
    "tdpo1",
    formula="-ls(beta (u_w - u_l + K_w - K_l)),  K = sum_t KL(ref || pi)",
    source="TDPO1 (arXiv 2404.11999)",
    use="DPO with the divergence of each token held in balance",
    unit="pair",
    needs="pairs, reference, `StepLogps.kl`",
)
def tdpo1_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Token-level DPO. The layout's token weights also multiply the divergences.

    Args:
        logps: StepLogps with `.kl`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: the reference, as in `step_pref_loss`. TDPO needs one.
        beta: reward scale.
        weights: (P,) multiply the pairs' losses.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref_logits = torch.randn_like(logits)
        >>> logps, ref = step_logps(logits, layout, kl_ref_logits=ref_logits), step_logps(ref_logits, layout)
        >>> tdpo1_loss(logps, layout, pairs, ref=ref).loss.backward()
    """
    return _tdpo(logps, layout, pairs, ref, beta, weights, reduction, num_items, lambda k_w, k_l: k_w - k_l)


@loss_function(
    "tdpo2",
    formula="-ls(beta (u_w - u_l + tdpo_alpha (sg K_w - K_l))),  K = sum_t KL(ref || pi)",
    source="TDPO2 (arXiv 2404.11999)",
    use="as tdpo1, with a dial; its authors prefer it, with alpha 0.5",
    unit="pair",
    needs="pairs, reference, `StepLogps.kl`",
)
def tdpo2_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    tdpo_alpha: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """TDPO1 with the chosen response's divergence as a constant, and a factor on both.

    Args:
        logps: StepLogps with `.kl`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: the reference, as in `step_pref_loss`. TDPO needs one.
        beta: reward scale.
        tdpo_alpha: factor on the divergences.
        weights: (P,) multiply the pairs' losses.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref_logits = torch.randn_like(logits)
        >>> logps, ref = step_logps(logits, layout, kl_ref_logits=ref_logits), step_logps(ref_logits, layout)
        >>> tdpo2_loss(logps, layout, pairs, ref=ref).loss.backward()
    """
    check_not_negative("tdpo_alpha", tdpo_alpha)
    return _tdpo(
        logps, layout, pairs, ref, beta, weights, reduction, num_items,
        lambda k_w, k_l: tdpo_alpha * (k_w.detach() - k_l),
    )  # fmt: skip


def wpo_weights(logps: StepLogps, layout: StepLayout, pairs: StepPairs | Tensor | None = None) -> Tensor:
    """WPO's pair weights w_w * w_l, w = exp mean_t (log pi_t - log sum_v pi_v^2) (arXiv 2406.11827).

    Any pair loss takes them as `weights=`; TRL's `use_weighting`. The mean is over scored tokens, without the layout's
    token weights.

    Args:
        logps: StepLogps with `.sum_p2` (`step_logps(..., sum_p2=True)`).
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.

    Returns:
        (P,) float, detached.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: `logps` has no `.sum_p2`, or does not fit the layout.

    Examples:
        >>> logps = step_logps(logits, layout, sum_p2=True)
        >>> weights = wpo_weights(logps, layout, pairs)
        >>> pref_loss(logps, layout, pairs, weights=weights, reference_free=True).loss.backward()
    """
    check_logps("logps", logps, layout)
    if logps.sum_p2 is None:
        raise ValueError("logps: expected .sum_p2 (step_logps(..., sum_p2=True)), got None")
    pairs = resolve_pairs(layout, pairs)
    aligned = logps.tokens.detach() - logps.sum_p2.detach().log()
    mean = sums_over_steps(aligned, replace(layout, weights=None)) / layout.counts.clamp(min=1)
    winner, loser = pairs.index.long().unbind(1)
    return torch.exp(mean[winner] + mean[loser])


@loss_function(
    "full_step_dpo",
    formula="-sg[sig(beta (U_j - U_i))] (sum_t a+_t p+_t log pi_t / n_i - sum_t a-_t p-_t log pi_t / n_j) for pairs of "
    "solutions i > j; a+- = n softmax_t(+-tau R_k), p+- = sg sig(-+kappa log(pi/ref)_t)",
    source="Full-Step-DPO (arXiv 2502.14356), its released gradient form",
    use="a reward for every step of whole solutions, all of which learn",
    unit="pair of sequences",
    needs="pairs of sequences (P, 2), step rewards (S,), reference by token",
)
def full_step_dpo_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: Tensor,
    step_rewards: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    tau: float = 1.0,
    kappa: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Full-Step-DPO: all steps of both solutions learn, each weighted by its reward.

    The value is that of the printed surrogate, but only its gradient matters: the sigmoid, the step weights and the
    token weights are constants. With equal step rewards and kappa 0 it is DPO's gradient on token means, up to factors.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: (P, 2) int: sequence numbers, the better solution first.
        step_rewards: (S,) float, constants.
        ref: a reference with tokens: StepLogps, (N,) or (B, T).
        beta: reward scale.
        tau: inverse temperature of the step weights.
        kappa: strength of the token weights.
        weights: (P,) multiply the pairs' losses.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> logps, ref = step_logps(logits, layout), step_logps(torch.randn_like(logits), layout)
        >>> rewards = torch.rand(layout.num_steps)
        >>> full_step_dpo_loss(logps, layout, torch.tensor([[0, 2], [1, 3]]), rewards, ref=ref).loss.backward()
    """
    check_positive("beta", beta)
    for name, value in (("tau", tau), ("kappa", kappa)):
        check_not_negative(name, value)
    u = log_ratios(logps, layout, ref, "Full-Step-DPO")
    assert ref is not None
    ratios = kappa * row_log_ratios(logps, layout, ref, "Full-Step-DPO")
    rewards = tau * per_unit("step_rewards", step_rewards, layout.num_steps, u)
    grid = StepGrid(layout)
    counts = grid.spread(layout.counts.to(u.dtype))
    total = grid.sequence_sums(u.detach())

    def side(sign: float) -> Tensor:
        """(B,): sum over the sequence's tokens of softmax weight * token weight * log pi."""
        tokens = sums_over_steps(torch.sigmoid(-sign * ratios) * logps.tokens, layout)
        score = grid.spread(sign * rewards)
        score = torch.where(counts > 0, score, torch.full_like(score, -1e30))
        top = torch.exp(score - score.max(1, keepdim=True).values)
        share = top / (counts * top).sum(1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
        return (share * grid.spread(tokens)).sum(1)

    check_tensor("pairs", pairs, ndim=2)
    check_shape("pairs", pairs, (len(pairs), 2))
    index = unit_numbers("pairs", pairs, layout, unit="sequence")
    better, worse = index.unbind(1)
    valid = (counts.sum(1) > 0)[index].all(1)
    losses = -torch.sigmoid(beta * (total[worse] - total[better])) * (side(1.0)[better] - side(-1.0)[worse])
    loss, losses = reduce_units(losses, valid, weights, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())
