# SPDX-License-Identifier: Apache-2.0
"""Constant token weights (B, T) that turn a pair loss into another method: pass them to StepLayout's constructors.

Make them in the collator, on the host. Tokens of weight 0 are left out of the layout and cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_shape


def ld_dpo_weights(labels: Tensor, ld_alpha: float, *, ignore_index: int = -100) -> Tensor:
    """LD-DPO's weights (arXiv 2409.06411): 1 up to the length that both responses of a pair have, ld_alpha beyond it.

    Use them with loss_type "sigmoid" and one step a sequence. Pass the reference by token, so that it is weighted too.

    Args:
        labels: (B, T) int, unshifted, rows [chosen_0.., rejected_0..].
        ld_alpha: weight in [0, 1] of the tokens beyond the common length; TRL's `ld_alpha`.
        ignore_index: the label that is not scored.

    Returns:
        (B, T) float32.

    Raises:
        TypeError: The labels are no integers.
        ValueError: ld_alpha is outside [0, 1], or the number of rows is odd.

    Examples:
        >>> weighted = StepLayout.from_step_ids(labels, step_ids, token_weights=ld_dpo_weights(labels, 0.5))
    """
    check_integer("labels", labels, ndim=2)
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha: expected a number in [0, 1], got {ld_alpha!r}")
    if len(labels) % 2:
        raise ValueError(f"labels: expected rows [chosen.., rejected..], an even number, got {len(labels)}")
    scored = labels != ignore_index
    scored[:, :1] = False  # a sequence's first token has no row
    length = scored.sum(1)
    common = torch.minimum(*length.chunk(2)).repeat(2)
    shared = scored.cumsum(1) <= common[:, None]
    return torch.where(shared, 1.0, float(ld_alpha))


def tgdpo_weights(guide: Tensor, chosen: Tensor, *, beta: float, tgdpo_alpha: float) -> Tensor:
    """TGDPO's weights (arXiv 2506.14574): 1 + alpha beta v_t on chosen sequences, 1 - alpha beta v_t on rejected ones.

    Use them with loss_type "sigmoid" and the same beta, with the reference by token.

    Args:
        guide: (B, T) float, aligned with the labels: log-ratio v_t of a frozen preference-trained model to its
            reference.
        chosen: (B,) bool.
        beta: that of the loss.
        tgdpo_alpha: strength of the guide.

    Returns:
        (B, T) float32.

    Raises:
        TypeError: The guide is no float tensor.
        ValueError: The shapes do not agree.

    Examples:
        >>> chosen = torch.tensor([True, True, False, False])
        >>> weights = tgdpo_weights(torch.randn(4, 16), chosen, beta=0.1, tgdpo_alpha=0.5)
    """
    check_float("guide", guide, ndim=2)
    check_shape("chosen", chosen, (len(guide),))
    sign = torch.where(chosen, 1.0, -1.0)[:, None]
    return 1 + tgdpo_alpha * beta * sign * guide.detach().float()


def spo_weights(old_logps: Tensor, threshold: float = 0.9) -> Tensor:
    """SPO-chain's weights (arXiv 2505.23564): 1 for tokens whose old probability is below the threshold, else 0.

    Args:
        old_logps: (B, T) float: token log-probs of the policy that sampled them, aligned with the labels.
        threshold: a probability.

    Returns:
        (B, T) float32.

    Raises:
        TypeError: The log-probs are no float tensor.

    Examples:
        >>> spo_weights(torch.tensor([[0.5, 0.95]]).log())
        tensor([[1., 0.]])
    """
    check_float("old_logps", old_logps, ndim=2)
    return (old_logps.exp() < threshold).to(torch.float32)


def full_step_weights(step_rewards: Tensor, step_ids: Tensor, *, tau: float = 1.0, better: bool) -> Tensor:
    """Full-Step-DPO's weights (arXiv 2502.14356, kappa = 0): n * softmax over tokens of +-tau * step reward.

    The softmax is over a sequence's scored tokens, and n is their number.

    Args:
        step_rewards: (B, K) float: of step k of each sequence.
        step_ids: (B, T) int, -1 where nothing is scored; there the weight is 0.
        tau: inverse temperature.
        better: True for better solutions (+tau), False for worse ones (-tau).

    Returns:
        (B, T) float32.

    Raises:
        TypeError: The rewards are no float tensor, or the step ids no integers.

    Examples:
        >>> weights = full_step_weights(torch.rand(4, 16), step_ids, better=True)
    """
    check_float("step_rewards", step_rewards, ndim=2)
    check_integer("step_ids", step_ids, ndim=2)
    scored = step_ids >= 0
    scores = (tau if better else -tau) * step_rewards.gather(1, step_ids.clamp(min=0).long()).float()
    share = torch.where(scored, scores, torch.full_like(scores, -torch.inf)).softmax(1).nan_to_num()
    return share * scored.sum(1, keepdim=True)
