# SPDX-License-Identifier: Apache-2.0
"""slime: step advantages, and a loss with the ratio of steps.

    --custom-advantage-function-path sspo_ext.integrations.slime.step_advantage
    --loss-type custom_loss --custom-loss-function-path sspo_ext.integrations.slime.step_loss

Written against THUDM/slime at 624b824a of August 2026; no release is on PyPI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..signals.credit.baselines import outcome_advantages
from ..signals.credit.tokens import combine_advantages_tokens, step_gae_tokens
from .steps import apart, policy_loss_at, steps_of_values


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


_REFUSED = ("use_kl_loss", "use_tis", "use_opsm", "get_mismatch_metrics", "normalize_advantages")


def step_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with the ratio of steps, which are runs of equal advantages.

    Log-probs, their temperature and the mean over samples or tokens are slime's own. The last is read off its reducer:
    what a token weighs is the derivative of `sum_of_sample_mean` by it.

    Args:
        args: slime's; eps_clip, eps_clip_high, eps_clip_c, entropy_coef and use_rollout_logprobs are read.
        batch: "advantages" of `step_advantage`, "log_probs" or "rollout_log_probs", "loss_masks" and what slime's own
            log-probs need.
        logits: (1, T, V) float32.
        sum_of_sample_mean: slime's reducer of all responses' tokens, end to end.

    Returns:
        The loss, and what slime logs of it.

    Raises:
        ValueError: An option that this loss has not got, or context parallelism, which cuts steps.
    """
    from slime.backends.megatron_utils.loss import (  # pyright: ignore[reportMissingImports]
        get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs,
    )

    for name in _REFUSED:
        if getattr(args, name, False):
            raise ValueError(f"{name}: expected it off with sspo_ext's step_loss, got {getattr(args, name)!r}")
    _, found = get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"], with_entropy=True, **get_rollout_top_p_logprob_kwargs(args, batch),
    )  # fmt: skip
    new, entropy = found["log_probs"], torch.cat(found["entropy"])
    if [len(row) for row in new] != list(batch["response_lengths"]):
        raise ValueError("context_parallel_size: expected 1 with sspo_ext's step_loss, since steps must not be cut")
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = old or [row.detach() for row in new]
    with torch.enable_grad():
        ones = torch.ones(sum(map(len, new)), device=logits.device, requires_grad=True)
        (weights,) = torch.autograd.grad(sum_of_sample_mean(ones), ones)
    out = policy_loss_at(
        "step", _padded(new), _padded(old), _padded(batch["advantages"]), _padded(batch["loss_masks"]),
        token_weights=_padded(weights.split(list(batch["response_lengths"]))), aggregation="sum", num_items=1,
        epsilon=args.eps_clip, epsilon_high=args.eps_clip if args.eps_clip_high is None else args.eps_clip_high,
        delta=args.eps_clip_c,
    )  # fmt: skip
    entropy_loss = sum_of_sample_mean(entropy)
    loss = out.loss - args.entropy_coef * entropy_loss
    log = {
        "loss": loss, "pg_loss": out.loss, "entropy_loss": entropy_loss,
        "pg_clipfrac": out.metrics["clip_ratio/region_mean"] * weights.sum(),  # slime divides by that
        "ppo_kl": sum_of_sample_mean(torch.cat(list(old)) - torch.cat(list(new))),
    }  # fmt: skip
    return loss, {name: value.detach().clone() for name, value in log.items()}


def _padded(rows: Any) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
