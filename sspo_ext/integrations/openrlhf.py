# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF 0.11: its PolicyLoss with the ratio of steps.

`use_step_ratio()` puts it in place, before the trainer starts. OpenRLHF hands a loss no steps: they are the runs of
equal advantages, which `steps.apart` keeps apart where an advantage is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._versions import check_version
from .steps import ON, policy_loss_at


class StepPolicyLoss(nn.Module):
    """Has the arguments and the results of OpenRLHF's PolicyLoss; is_correction must be off.

    `correction` has options of `rollout_correction`, for tokens with rollout log-probs; None: none.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        level: str = "step",
        correction: Mapping[str, Any] | None = ON,
        **is_correction,
    ):
        super().__init__()
        if policy_loss_type != "ppo":
            raise ValueError(
                f"policy_loss_type: expected 'ppo' (level={level!r} says whose ratio), got {policy_loss_type!r}"
            )
        if is_correction_level != "off":
            raise ValueError(
                "is_correction_level: expected 'off' beside `correction`, which use_step_ratio takes, got "
                f"{is_correction_level!r}"
            )
        self.clip = {"epsilon": clip_eps_low, "epsilon_high": clip_eps_high, "delta": dual_clip}
        self.token_level_loss, self.level, self.correction = token_level_loss, level, correction

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Loss, share of clipped tokens, KL, and two places for a correction."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        items = batch_num_tokens if self.token_level_loss else global_batch_size
        out = policy_loss_at(
            self.level, log_probs, old_log_probs, advantages, mask,
            aggregation="token" if self.token_level_loss else "sequence",
            num_items=None if items is None else items / dp_size, rollout=rollout_log_probs,
            correction=self.correction, **self.clip,
        )  # fmt: skip
        difference = torch.where(mask.bool(), old_log_probs - log_probs.detach(), 0.0)
        return out.loss, out.metrics["clip_ratio/region_mean"], difference.sum() / mask.sum().clamp(min=1), None, None


def use_step_ratio(level: str = "step", correction: Mapping[str, Any] | None = ON) -> None:
    """Let OpenRLHF's actor make this loss, with the ratio of a "step", "token" or "sequence".

    `correction`: see StepPolicyLoss.
    """
    check_version("openrlhf", "0.11")
    from openrlhf.trainer.ray import ppo_actor  # pyright: ignore[reportMissingImports]

    ppo_actor.PolicyLoss = lambda **options: StepPolicyLoss(level=level, correction=correction, **options)
