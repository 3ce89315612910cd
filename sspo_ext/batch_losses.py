"""Losses of more than a pair at a time: unpaired (KTO), sorted over the batch (AOT), listwise, with a third response.

What depends on the whole batch is explicit: a reference point or a running mean is passed in and comes back, and
`group=` names the data-parallel ranks it is taken over. Nothing is remembered between calls.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_not_negative, check_positive, check_shape, describe
from .batch_state import all_reduce
from .heads.numerics import logistic
from .layout import StepLayout
from .logps import StepLogps
from .pair_spec import resolve_pairs
from .pairs import StepPairs
from .step_functions import (
    StepLossOutput,
    log_ratios,
    loss_function,
    masked_mean,
    per_unit,
    reduce_units,
    unit_numbers,
)


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


def _over_ranks(values: Tensor, group) -> Tensor:
    """(W * P,): every rank's values, with gradient to this rank's. All ranks must bring as many."""
    if group is None:
        return values
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    everyone = values.new_empty(world * len(values))
    dist.all_gather_into_tensor(everyone, values.detach().contiguous(), group=group)
    parts = list(everyone.chunk(world))
    parts[rank] = values
    return torch.cat(parts)


def _sorted_last(values: Tensor, valid: Tensor) -> Tensor:
    """Ascending, with what is not valid (and a gradient of 0) at the end."""
    return torch.where(valid, values, torch.full_like(values, torch.inf)).sort().values


def _aot(high: Tensor, low: Tensor, valid: Tensor, beta, label_smoothing, reduction, num_items, group):
    """Smoothed logistic of sorted values of (P,) pairs; a mean over all ranks."""
    check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    high, low, valid = (_over_ranks(v, group) for v in (high, low, valid.to(high.dtype)))
    valid = valid > 0
    placed = torch.arange(len(valid), device=valid.device) < valid.sum()
    high, low = (torch.where(placed, _sorted_last(v, valid), torch.zeros_like(v)) for v in (high, low))
    label = torch.full_like(high, 1 - label_smoothing)
    loss, losses = reduce_units(logistic(beta * (high - low), label), placed, None, reduction, num_items)
    if group is not None:
        # data parallel averages gradients, while each rank sees only its own part of this loss's
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
    """Alignment by optimal transport of margins. `losses` are in the sorted order, of all ranks of `group`, which must
    bring equally many pairs; gradients are then those of the mean over all ranks once data parallel has averaged."""
    u = log_ratios(logps, layout, ref, "AOT")
    pairs = resolve_pairs(layout, pairs, None, None, None)
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
    """Alignment by optimal transport of rewards; arguments as in `aot_loss`."""
    u = log_ratios(logps, layout, ref, "AOT")
    pairs = resolve_pairs(layout, pairs, None, None, None)
    winner, loser = pairs.index.long().unbind(1)
    loss, losses = _aot(u[winner], u[loser], pairs.valid, beta, label_smoothing, reduction, num_items, group)
    return StepLossOutput(loss, losses, beta * u.detach())


_NOBODY = -1e30  # the reward of a list's padding


def _list_scores(logps, layout: StepLayout, lists: Tensor, ref, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """u (S,); beta * u of each list's members (G, n), very small where there is none; which there are (G, n)."""
    check_positive("beta", beta)
    u = log_ratios(logps, layout, ref)
    lists = unit_numbers("lists", lists, layout, padded=True)
    if lists.ndim != 2:
        raise ValueError(f"lists: expected (G, n) step numbers, got {describe(lists)}")
    there = (lists >= 0) & (layout.counts > 0)[lists.clamp(min=0)]
    rewards = beta * u[lists.clamp(min=0)]
    # an infinity would have no gradient through logcumsumexp
    return u, torch.where(there, rewards, torch.full_like(rewards, _NOBODY)), there


@loss_function(
    "plackett_luce",
    formula="-sum_{i < n} [r_i - log sum_{j >= i} e^r_j],  r = beta u, best response first",
    source="DPO (arXiv 2305.18290), appendix A.3: its Plackett-Luce form",
    use="a full ranking of n responses; with n = 2 it is sigmoid",
    unit="list",
    needs="lists (G, n) of step numbers",
)
def plackett_luce_loss(
    logps: StepLogps,
    layout: StepLayout,
    lists: Tensor,  # (G, n) int: step numbers, best first; -1 pads a shorter list
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    weights: Tensor | None = None,  # (G,)
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Negative log-likelihood of each ranking, over lists with two or more non-empty steps."""
    u, rewards, there = _list_scores(logps, layout, lists, ref, beta)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)
    losses = torch.where(there, rest - rewards, torch.zeros_like(rest)).sum(1)
    loss, losses = reduce_units(losses, there.sum(1) > 1, weights, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())


@loss_function(
    "listwise",
    formula="-sum_i p_i log softmax(beta u)_i,  p = softmax(scores / temperature)",
    source="InfoNCA (arXiv 2402.05369) and listwise DPO with soft targets; p one-hot is best-of-n classification",
    use="n responses with scores of a reward model or shares of correct answers",
    unit="list",
    needs="lists (G, n) of step numbers, scores (G, n)",
)
def listwise_loss(
    logps: StepLogps,
    layout: StepLayout,
    lists: Tensor,  # (G, n) int: step numbers; -1 pads a shorter list
    scores: Tensor,  # (G, n) float: constants; of padding they do not matter
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 0.1,
    score_temperature: float = 1.0,
    weights: Tensor | None = None,  # (G,)
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Cross-entropy of the rewards' softmax on the scores' softmax, over lists with two or more non-empty steps."""
    check_positive("score_temperature", score_temperature)
    u, rewards, there = _list_scores(logps, layout, lists, ref, beta)
    check_shape("scores", scores, tuple(rewards.shape))
    scores = per_unit("scores", scores.reshape(-1), scores.numel(), u).view(rewards.shape) / score_temperature
    enough = there.sum(1) > 1
    target = torch.where(there, scores, torch.full_like(scores, _NOBODY)).softmax(1)
    logs = rewards.log_softmax(1)
    losses = -torch.where(there, target * logs, torch.zeros_like(logs)).sum(1)
    loss, losses = reduce_units(losses, enough, weights, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())


@loss_function(
    "tpo",
    formula="-q ls(z) - (1 - q) ls(-z) + tpo_alpha NLL(gold),  z = beta (S_w - S_l); NLL over all gold tokens",
    source="TPO (arXiv 2405.16681), as TRL's TPOTrainer 'sigmoid'",
    use="a gold response beside the pair, no reference model",
    unit="pair",
    needs="pairs, gold steps (G,)",
)
def tpo_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor,
    gold: Tensor,  # (G,) int: steps of the gold responses
    *,
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Triple preference optimisation: a reference-free logistic loss and the gold responses' token-mean NLL."""
    return _tpo(logps, layout, pairs, gold, False, beta, 0.0, tpo_alpha, label_smoothing, reduction, num_items)


@loss_function(
    "tpo_l",
    formula="-q ls(z) - (1 - q) ls(-z) + tpo_alpha NLL(gold),  z = beta (S_w / n_w - S_l / n_l) - tpo_l_gamma",
    source="TPO-L (arXiv 2405.16681), as TRL's TPOTrainer 'tpo-l'",
    use="as tpo, responses of different lengths",
    unit="pair",
    needs="pairs, gold steps (G,)",
)
def tpo_l_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor,
    gold: Tensor,  # (G,) int
    *,
    beta: float = 2.0,
    tpo_l_gamma: float = 0.5,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """TPO on token means, with a target margin in units of the reward."""
    return _tpo(logps, layout, pairs, gold, True, beta, tpo_l_gamma, tpo_alpha, label_smoothing, reduction, num_items)


def _tpo(logps, layout, pairs, gold, means, beta, gamma, alpha, label_smoothing, reduction, num_items):
    check_positive("beta", beta)
    check_not_negative("tpo_alpha", alpha)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    sums = log_ratios(logps, layout, None)
    pairs = resolve_pairs(layout, pairs, None, None, None)
    scores = sums / layout.counts.clamp(min=1) if means else sums
    winner, loser = pairs.index.long().unbind(1)
    z = beta * (scores[winner] - scores[loser]) - gamma
    loss, losses = reduce_units(
        logistic(z, torch.full_like(z, 1 - label_smoothing)), pairs.valid, None, reduction, num_items
    )
    gold = unit_numbers("gold", gold, layout)
    nll = -sums[gold].sum() / layout.counts[gold].sum().clamp(min=1)
    return StepLossOutput(loss + alpha * nll, losses.detach(), beta * scores.detach(), {"nll": nll.detach()})


@loss_function(
    "trpa",
    formula="-ls(b (u_w / n_w - u_l / n_l)),  b = beta, times top_scale where the winner is of the top level",
    source="TRPA (arXiv 2504.04524), its released loss; pairs of different levels from `level_pairs`. The KL "
    "regulariser that the paper describes is not in the code that was read",
    use="answers ranked in levels by rules (correct, well formed, neither)",
    unit="pair",
    needs="pairs, top level (P,) bool, reference",
)
def trpa_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor,
    top: Tensor,  # (P,) bool: the winner is of the best level
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 1.0,
    top_scale: float = 2.5,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Logistic loss of token-mean log-ratios between levels."""
    check_positive("beta", beta)
    check_positive("top_scale", top_scale)
    u = log_ratios(logps, layout, ref, "TRPA")
    pairs = resolve_pairs(layout, pairs, None, None, None)
    check_shape("top", top, (pairs.num_pairs,))
    means = u / layout.counts.clamp(min=1)
    winner, loser = pairs.index.long().unbind(1)
    z = beta * (means[winner] - means[loser])
    z = torch.where(top, top_scale * z, z)
    loss, losses = reduce_units(-F.logsigmoid(z), pairs.valid, None, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())


def level_pairs(levels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (P, 2) of steps of one group whose levels differ, the smaller level (1 is best) winning, and (P,) whether
    the winner is of level 1. levels, groups: (S,) int on the host; a level below 1 leaves a step out."""
    check_shape("groups", groups, tuple(levels.shape))
    better = (groups[:, None] == groups[None]) & (levels[:, None] < levels[None]) & (levels[:, None] >= 1)
    index = better.nonzero()
    return index, levels[index[:, 0]] == 1
