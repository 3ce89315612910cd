# SPDX-License-Identifier: Apache-2.0
"""SkyRL 0.3: an advantage estimator and a policy loss for its two registries, both named "sspo".

Values come as SkyRL's own `values` (B, T), with a number at the first token of each step and NaN elsewhere. SkyRL
scales advantages so that its losses are sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._versions import check_version
from ..signals.credit.baselines import outcome_advantages
from ..signals.credit.tokens import combine_advantages_tokens, step_gae_tokens
from .steps import ON, apart, policy_loss_at, steps_of_values

NAME = "sspo"


def step_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    values: Tensor | None = None,
    grpo_norm_by_std: bool = True,
    gamma: float = 1.0,
    lambd: float = 1.0,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """GAE over steps, added to the outcome's advantage in its group."""
    if values is None:
        raise ValueError(
            "values: expected (B, T), a number at the first token of each step and NaN elsewhere, got None"
        )
    step_ids, values = steps_of_values(values, response_mask)
    steps = step_gae_tokens(values, token_level_rewards, step_ids, gamma=gamma, lam=lambd)
    groups = torch.from_numpy(np.unique(np.asarray(index, str), return_inverse=True)[1]).to(values.device)
    name = "grpo" if grpo_norm_by_std else "dr_grpo"
    outcome = outcome_advantages(token_level_rewards.sum(1), name, groups=groups)
    advantages = combine_advantages_tokens(steps, outcome, step_ids)
    return apart(advantages, step_ids), advantages


def step_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO's loss with the ratio of steps, summed, with importance weights where there are rollout log-probs."""
    return _step_loss(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs, correction=ON)


def _step_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    correction: Mapping[str, Any] | None,
) -> tuple[Tensor, dict[str, float]]:
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    out = policy_loss_at(
        "step", log_probs, old_log_probs, advantages, mask, aggregation="sum", rollout=rollout_logprobs,
        correction=correction, epsilon=config.eps_clip_low, epsilon_high=config.eps_clip_high,
    )  # fmt: skip
    told = {name: value.item() for name, value in out.metrics.items() if name.startswith("sampling/")}
    return out.loss, {"clip_ratio": out.metrics["clip_ratio/region_mean"].item(), **told}


def register(correction: Mapping[str, Any] | None = ON) -> None:
    """Put both into SkyRL's registries; then `adv_estimator` and `policy_loss_type` may be "sspo".

    Args:
        correction: options of `rollout_correction`, for tokens with rollout log-probs; None: none. SkyRL's own
            `off_policy_correction` is not applied by this loss.
    """
    check_version("skyrl", "0.3")
    from skyrl.backends.skyrl_train.utils import ppo_utils  # pyright: ignore[reportMissingImports]

    ppo_utils.register_advantage_estimator(NAME)(step_advantage)
    ppo_utils.register_policy_loss(NAME)(functools.partial(_step_loss, correction=correction))
