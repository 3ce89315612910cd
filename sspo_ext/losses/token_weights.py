"""Constant token weights (B, T) that turn a pair loss into another method: pass them to StepLayout's constructors.

Made in the collator, on the host. Tokens of weight 0 are left out of the layout and cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_shape


def ld_dpo_weights(labels: Tensor, ld_alpha: float, *, ignore_index: int = -100) -> Tensor:
    """(B, T): 1 up to the length that both responses of a pair have, ld_alpha beyond it (LD-DPO, arXiv 2409.06411).

    labels: (B, T) unshifted, rows [chosen_0.., rejected_0..]. Use with loss_type "sigmoid" and one step a sequence;
    pass the reference by token, so that it is weighted too. TRL's `ld_alpha`.
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
    """(B, T): 1 + alpha beta v_t on chosen sequences, 1 - alpha beta v_t on rejected ones (TGDPO, arXiv 2506.14574).

    guide: (B, T) log-ratio v_t of a frozen preference-trained model to its reference, aligned with the labels.
    chosen: (B,) bool. Use with loss_type "sigmoid" and the same beta, the reference by token.
    """
    check_float("guide", guide, ndim=2)
    check_shape("chosen", chosen, (len(guide),))
    sign = torch.where(chosen, 1.0, -1.0)[:, None]
    return 1 + tgdpo_alpha * beta * sign * guide.detach().float()


def spo_weights(old_logps: Tensor, threshold: float = 0.9) -> Tensor:
    """(B, T): 1 for tokens whose old probability is below the threshold, 0 for the rest (SPO-chain, arXiv 2505.23564).

    old_logps: (B, T) token log-probs under the policy that sampled them, aligned with the labels.
    """
    check_float("old_logps", old_logps, ndim=2)
    return (old_logps.exp() < threshold).to(torch.float32)


def full_step_weights(step_rewards: Tensor, step_ids: Tensor, *, tau: float = 1.0, better: bool) -> Tensor:
    """(B, T): n * softmax over a sequence's tokens of +-tau * step reward, + for better solutions (Full-Step-DPO, arXiv
    2502.14356, kappa = 0).

    step_rewards: (B, K) of step k of each sequence. step_ids: (B, T), -1 where nothing is scored; -1 gets weight 0.
    """
    check_float("step_rewards", step_rewards, ndim=2)
    check_integer("step_ids", step_ids, ndim=2)
    scored = step_ids >= 0
    scores = (tau if better else -tau) * step_rewards.gather(1, step_ids.clamp(min=0).long()).float()
    share = torch.where(scored, scores, torch.full_like(scores, -torch.inf)).softmax(1).nan_to_num()
    return share * scored.sum(1, keepdim=True)
