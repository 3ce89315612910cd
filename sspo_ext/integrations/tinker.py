# SPDX-License-Identifier: Apache-2.0
"""Tinker 0.38: a loss for `forward_backward_custom`, from the log-probs that come back.

The ratio is over the log-probs that the tokens were sampled with, so it corrects for the rollouts by itself, within its
clip range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._versions import check_version
from ..layout.steps import StepLayout
from ..losses.from_logps import policy_loss


def step_loss(**options: Any) -> Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]:
    """Make a loss function for `training_client.forward_backward_custom(data, loss_fn)`.

    Each Datum has, beside "target_tokens", "step_ids" (int, -1 where nothing is scored), "advantages" (of its tokens)
    and, for losses with a ratio, "logprobs" (of the policy that sampled); all of the length of the target tokens.

    Args:
        **options: options of `policy_loss`.

    Returns:
        The function of (data, log-probs).

    Raises:
        ImportError: another version of tinker is installed, or none.
    """
    check_version("tinker", "0.38")

    def loss(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        def field(name: str) -> Tensor:
            return torch.cat([datum.loss_fn_inputs[name].to_torch().reshape(-1) for datum in data])

        cu_seqlens = torch.tensor([0, *(len(one) for one in logprobs)]).cumsum(0)
        step_ids = field("step_ids").long()
        layout = StepLayout.from_response(step_ids >= 0, step_ids, cu_seqlens=cu_seqlens)
        given: dict[str, Any] = {"old": field("logprobs")[None]} if "logprobs" in data[0].loss_fn_inputs else {}
        out = policy_loss(torch.cat(list(logprobs))[None], layout, field("advantages")[None], **given, **options)
        return out.loss, {name: float(value) for name, value in out.metrics.items()}

    return loss
