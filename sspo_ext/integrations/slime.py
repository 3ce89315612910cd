# SPDX-License-Identifier: Apache-2.0
"""slime: `--custom-advantage-function-path sspo_ext.integrations.slime.step_advantage`.

The loss is slime's own, with its own correction for rollouts (`--use-tis`).

Written against THUDM/slime's call `custom_advantage(args, rollout_data)`; no release is on PyPI.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..signals.credit.baselines import outcome_advantages
from ..signals.credit.tokens import combine_advantages_tokens, step_gae_tokens
from .steps import apart, steps_of_values


def step_advantage(args: Any, rollout_data: dict[str, Any]) -> None:
    """Write "advantages" and "returns", a tensor for each sample.

    "values" are tensors (T,) of each response, a number at the first token of each step and NaN elsewhere. "rewards"
    are slime's, normalised in their groups if its options say so: the outcome's advantage. What steps earn is
    "raw_reward", on the scale of the values.

    Args:
        args: slime's; gamma and lambd are read.
        rollout_data: "values", "rewards", "raw_reward", "loss_masks" of the same samples.
    """
    lengths = [len(mask) for mask in rollout_data["loss_masks"]]
    values = pad_sequence(list(rollout_data["values"]), batch_first=True, padding_value=float("nan"))
    mask = pad_sequence([m.to(values.device) for m in rollout_data["loss_masks"]], batch_first=True)
    rewards, raw = (
        torch.tensor(rollout_data[name], dtype=torch.float32, device=values.device)
        for name in ("rewards", "raw_reward")
    )
    step_ids, values = steps_of_values(values, mask)
    steps = step_gae_tokens(values, raw, step_ids, gamma=args.gamma, lam=args.lambd)
    advantages = combine_advantages_tokens(steps, outcome_advantages(rewards, "reinforce"), step_ids)
    for name, rows in (("advantages", apart(advantages, step_ids)), ("returns", advantages)):
        rollout_data[name] = [row[:n] for row, n in zip(rows, lengths, strict=True)]
