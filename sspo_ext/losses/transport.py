# SPDX-License-Identifier: Apache-2.0
"""AOT: losses on log-ratios sorted over the batch (optimal transport in one dimension)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_positive
from ..formulas.numerics import logistic
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from ..objective.pair_arguments import check_smoothing, resolve_pairs
from ..objective.sums import StepLogps
from .common import StepLossOutput, log_ratios, loss_function, reduce_units


def _over_ranks(values: Tensor, group) -> Tensor:
    """(W * P,): the values of all W ranks, with gradient to this rank's. All ranks must have equally many."""
    if group is None:
        return values
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    everyone = values.new_empty(world * len(values))
    dist.all_gather_into_tensor(everyone, values.detach().contiguous(), group=group)
    parts = list(everyone.chunk(world))
    parts[rank] = values
    return torch.cat(parts)


def _sorted_last(values: Tensor, valid: Tensor) -> Tensor:
    """Ascending; the invalid ones are at the end and get no gradient."""
    return torch.where(valid, values, torch.full_like(values, torch.inf)).sort().values


def _aot(high: Tensor, low: Tensor, valid: Tensor, beta, label_smoothing, reduction, num_items, group):
    """Smoothed logistic of the differences of sorted values (P,); a mean over all ranks."""
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    high, low, valid = (_over_ranks(v, group) for v in (high, low, valid.to(high.dtype)))
    valid = valid > 0
    placed = torch.arange(len(valid), device=valid.device) < valid.sum()
    high, low = (torch.where(placed, _sorted_last(v, valid), torch.zeros_like(v)) for v in (high, low))
    label = torch.full_like(high, 1 - label_smoothing)
    loss, losses = reduce_units(logistic(beta * (high - low), label), placed, None, reduction, num_items)
    if group is not None:
        # each rank sees only its own part of the gradient, and data parallel divides by the number of ranks
        loss = loss + (dist.get_world_size(group) - 1) * (loss - loss.detach())
    return loss, losses.detach()


@loss_function(
    "aot",
    formula="-q ls(z) - (1 - q) ls(-z),  z_i = beta (sort(S_w - S_l)_i - sort(R_w - R_l)_i)",
    source="AOT (arXiv 2406.05882), paired, as TRL's loss_type 'aot'",
    use="the policy's margins should dominate the reference's as a distribution",
    unit="pair",
    needs="pairs, reference; a sort over the batch",
)
def aot_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    group=None,
) -> StepLossOutput:
    """Alignment by optimal transport of margins.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: the reference, as in `step_pref_loss`. AOT needs one.
        beta: reward scale.
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.
        group: data-parallel ranks over which to sort; they must have equally many pairs. Once data parallel has
            averaged the gradients, they are those of the mean over all ranks.

    Returns:
        StepLossOutput; `.losses` is in the sorted order, of all ranks of `group`.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref = step_logps(torch.randn_like(logits), layout)
        >>> aot_loss(step_logps(logits, layout), layout, pairs, ref=ref).loss.backward()
    """
    u = log_ratios(logps, layout, ref, "AOT")
    pairs = resolve_pairs(layout, pairs)
    winner, loser = pairs.index.long().unbind(1)
    sums, ref_sums = logps.sums, (logps.sums - u).detach()
    loss, losses = _aot(
        sums[winner] - sums[loser], ref_sums[winner] - ref_sums[loser], pairs.valid, beta, label_smoothing, reduction,
        num_items, group,
    )  # fmt: skip
    return StepLossOutput(loss, losses, beta * u.detach())


@loss_function(
    "aot_unpaired",
    formula="-q ls(z) - (1 - q) ls(-z),  z_i = beta (sort(u_w)_i - sort(u_l)_i)",
    source="AOT (arXiv 2406.05882), unpaired, as TRL's loss_type 'aot_unpaired'",
    use="as aot, where chosen and rejected responses have different prompts",
    unit="pair",
    needs="pairs (their order does not matter), reference; a sort over the batch",
)
def aot_unpaired_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    group=None,
) -> StepLossOutput:
    """Alignment by optimal transport of rewards.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: the reference, as in `step_pref_loss`. AOT needs one.
        beta: reward scale.
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.
        group: data-parallel ranks over which to sort; they must have equally many pairs. Once data parallel has
            averaged the gradients, they are those of the mean over all ranks.

    Returns:
        StepLossOutput; `.losses` is in the sorted order, of all ranks of `group`.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref = step_logps(torch.randn_like(logits), layout)
        >>> aot_unpaired_loss(step_logps(logits, layout), layout, pairs, ref=ref).loss.backward()
    """
    u = log_ratios(logps, layout, ref, "AOT")
    pairs = resolve_pairs(layout, pairs)
    winner, loser = pairs.index.long().unbind(1)
    loss, losses = _aot(u[winner], u[loser], pairs.valid, beta, label_smoothing, reduction, num_items, group)
    return StepLossOutput(loss, losses, beta * u.detach())
