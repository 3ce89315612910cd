# SPDX-License-Identifier: Apache-2.0
"""Losses of more than two responses to one prompt, and pairs made from ranked levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_integer, check_not_negative, check_positive, check_shape, describe
from ..formulas.numerics import logistic
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from ..objective.pair_arguments import check_smoothing, resolve_pairs
from ..objective.sums import StepLogps
from .common import StepLossOutput, log_ratios, loss_function, optional_log_ratios, per_unit, reduce_units, unit_numbers

_NOBODY = -1e30  # the reward of padding; an infinity would have no gradient through logcumsumexp


def _list_scores(u: Tensor, layout: StepLayout, lists: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards beta * u of each list's members (G, n), and a mask (G, n) of those that exist, from log-ratios (S,)."""
    check_positive("beta", beta)
    lists = unit_numbers("lists", lists, layout, padded=True)
    if lists.ndim != 2:
        raise ValueError(f"lists: expected (G, n) step numbers, got {describe(lists)}")
    there = (lists >= 0) & (layout.counts > 0)[lists.clamp(min=0)]
    rewards = beta * u[lists.clamp(min=0)]
    return torch.where(there, rewards, torch.full_like(rewards, _NOBODY)), there


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
    lists: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    beta: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Negative log-likelihood of each ranking, over lists with two or more non-empty steps.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        lists: (G, n) int: step numbers, best first; -1 pads a shorter list.
        ref: the reference, as in `step_pref_loss`.
        reference_free: as in `step_pref_loss`.
        beta: reward scale.
        weights: (G,) multiply the lists' losses.
        reduction: 'mean' over lists, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (G,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> lists = torch.tensor([[0, 2, 1]])
        >>> plackett_luce_loss(step_logps(logits, layout), layout, lists, reference_free=True).loss.backward()
    """
    u = optional_log_ratios("plackett_luce_loss", logps, layout, ref, reference_free)
    rewards, there = _list_scores(u, layout, lists, beta)
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
    lists: Tensor,
    scores: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    beta: float = 0.1,
    score_temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Cross-entropy of the rewards' softmax on the scores' softmax, over lists with two or more non-empty steps.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        lists: (G, n) int: step numbers; -1 pads a shorter list.
        scores: (G, n) float, constants; those of padding are not used.
        ref: the reference, as in `step_pref_loss`.
        reference_free: as in `step_pref_loss`.
        beta: reward scale.
        score_temperature: divides the scores.
        weights: (G,) multiply the lists' losses.
        reduction: 'mean' over lists, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (G,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> lists, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 0.0, 0.5]])
        >>> listwise_loss(step_logps(logits, layout), layout, lists, scores, reference_free=True).loss.backward()
    """
    check_positive("score_temperature", score_temperature)
    u = optional_log_ratios("listwise_loss", logps, layout, ref, reference_free)
    rewards, there = _list_scores(u, layout, lists, beta)
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
    gold: Tensor,
    *,
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Triple preference optimisation: a reference-free logistic loss, and the gold responses' token-mean NLL.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step.
        gold: (G,) int: the steps of the gold responses.
        beta: reward scale.
        tpo_alpha: weight of the gold responses' NLL.
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,), without the NLL, which is in `.metrics`.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> tpo_loss(step_logps(logits, layout), layout, pairs, gold=torch.tensor([0])).loss.backward()
    """
    sums = log_ratios(logps, layout, None)
    return _tpo(sums, layout, pairs, gold, sums, beta, 0.0, tpo_alpha, label_smoothing, reduction, num_items)


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
    gold: Tensor,
    *,
    beta: float = 2.0,
    tpo_l_gamma: float = 0.5,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """TPO on token means, with a target margin in units of the reward.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step.
        gold: (G,) int: the steps of the gold responses.
        beta: reward scale.
        tpo_l_gamma: target margin.
        tpo_alpha: weight of the gold responses' NLL.
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,), without the NLL, which is in `.metrics`.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> tpo_l_loss(step_logps(logits, layout), layout, pairs, gold=torch.tensor([0])).loss.backward()
    """
    sums = log_ratios(logps, layout, None)
    means = sums / layout.counts.clamp(min=1)
    return _tpo(sums, layout, pairs, gold, means, beta, tpo_l_gamma, tpo_alpha, label_smoothing, reduction, num_items)


def _tpo(sums, layout, pairs, gold, scores, beta, gamma, alpha, label_smoothing, reduction, num_items):
    """The logistic loss of `scores` (S,) and the gold responses' NLL, from log-probs `sums` (S,)."""
    check_positive("beta", beta)
    check_not_negative("tpo_alpha", alpha)
    check_smoothing(label_smoothing)
    pairs = resolve_pairs(layout, pairs)
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
    top: Tensor,
    *,
    ref: StepLogps | Tensor | None = None,
    beta: float = 1.0,
    top_scale: float = 2.5,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> StepLossOutput:
    """Logistic loss of token-mean log-ratios between levels.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: (P, 2) int of `level_pairs`, or StepPairs.
        top: (P,) bool: whether the winner is of the best level.
        ref: the reference, as in `step_pref_loss`. TRPA needs one.
        beta: reward scale.
        top_scale: factor on beta where the winner is of the best level.
        reduction: 'mean' over pairs, or 'sum'.
        num_items: divides the sum instead of their number, as in `step_pref_loss`.

    Returns:
        StepLossOutput; `.losses` is (P,).

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> ref = step_logps(logits.detach(), layout)
        >>> levels = torch.arange(layout.num_steps) + 1
        >>> index, top = level_pairs(levels, groups=torch.zeros_like(levels))
        >>> trpa_loss(step_logps(logits, layout), layout, index, top, ref=ref).loss.backward()
    """
    check_positive("beta", beta)
    check_positive("top_scale", top_scale)
    u = log_ratios(logps, layout, ref, "TRPA")
    pairs = resolve_pairs(layout, pairs)
    check_shape("top", top, (pairs.num_pairs,))
    means = u / layout.counts.clamp(min=1)
    winner, loser = pairs.index.long().unbind(1)
    z = beta * (means[winner] - means[loser])
    z = torch.where(top, top_scale * z, z)
    loss, losses = reduce_units(-F.logsigmoid(z), pairs.valid, None, reduction, num_items)
    return StepLossOutput(loss, losses.detach(), beta * u.detach())


def level_pairs(levels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of steps of one group whose levels differ; the smaller level wins.

    Args:
        levels: (S,) int on the host; 1 is best, and a level below 1 leaves a step out.
        groups: (S,) int on the host: the group of each step, its prompt for example.

    Returns:
        Pairs (P, 2) int, and (P,) bool: whether the winner is of level 1.

    Raises:
        TypeError: `levels` is no tensor of integers, or `groups` no tensor.
        ValueError: The shapes differ.

    Examples:
        >>> index, top = level_pairs(torch.tensor([1, 2, 2]), torch.tensor([0, 0, 0]))
        >>> index.tolist(), top.tolist()
        ([[0, 1], [0, 2]], [True, True])
    """
    check_integer("levels", levels, ndim=1)
    check_shape("groups", groups, tuple(levels.shape))
    better = (groups[:, None] == groups[None]) & (levels[:, None] < levels[None]) & (levels[:, None] >= 1)
    index = better.nonzero()
    return index, levels[index[:, 0]] == 1
