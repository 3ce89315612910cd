# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL: a LossFunction of log-probs with the ratio of steps.

Written against the protocol of NVIDIA-NeMo/RL as it stood at commit 002cdc27: no release that has it is on PyPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .steps import ON, policy_loss_at


class StepLoss:
    """PPO's loss with the ratio of a step, over tokens, as NeMo-RL calls it.

    Steps are the runs of equal advantages in `data["advantages"]`.

    Args:
        level: whose ratio: "step", "token" or "sequence".
        correction: options of `rollout_correction`, which weighs tokens by `data["generation_logprobs"]` where the data
            have them; None: none.
        **options: options of `policy_loss`: epsilon, epsilon_high, delta.
    """

    def __init__(self, level: str = "step", correction: Mapping[str, Any] | None = ON, **options: Any):
        from nemo_rl.algorithms.loss import interfaces  # pyright: ignore[reportMissingImports]

        self.loss_type, self.input_type = interfaces.LossType.TOKEN_LEVEL, interfaces.LossInputType.LOGPROB
        self.level, self.correction, self.options = level, correction, options

    def __call__(
        self,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics; log-probs (B, T - 1) are of the tokens from the second on."""
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        rollout = data["generation_logprobs"][:, 1:] if "generation_logprobs" in data else None
        out = policy_loss_at(
            self.level, next_token_logprobs, data["prev_logprobs"][:, 1:], data["advantages"][:, 1:], mask,
            num_items=global_valid_toks, rollout=rollout, correction=self.correction, **self.options,
        )  # fmt: skip
        told = {name: value.item() for name, value in out.metrics.items() if name.startswith("sampling/")}
        return out.loss, {"loss": out.loss.item(), "num_valid_samples": int(data["sample_mask"].sum()), **told}
