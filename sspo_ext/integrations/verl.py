# SPDX-License-Identifier: Apache-2.0
"""verl: `algorithm.adv_estimator=sspo`, `policy_loss.loss_mode=sspo` and the reward manager "sspo".

Values travel so: the reward manager probes a response and leaves the values, and where their steps begin, in its extra
info. The agent loop's output makes a (T,) tensor "values" of it, with a number at the first token of each step and NaN
elsewhere; with it the batch has values and steps. verl hands an estimator neither, so `compute_advantage` is wrapped,
for this estimator alone.

The rollouts' log-probs are corrected by verl itself (`algorithm.rollout_correction`); its weights multiply the loss.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.experimental.agent_loop import agent_loop  # pyright: ignore[reportMissingImports]
from verl.experimental.reward_loop.reward_manager import register  # pyright: ignore[reportMissingImports]
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager  # pyright: ignore
from verl.trainer.ppo import core_algos, ray_trainer  # pyright: ignore[reportMissingImports]

from .._versions import check_version
from ..signals.credit.baselines import outcome_advantages
from ..signals.credit.tokens import combine_advantages_tokens, step_gae_tokens
from ..signals.probing.texts import as_probe
from ..signals.split import delimiter_mask, step_ids_from_tokens
from ..signals.values import StepBatch
from .probing import values_before_steps
from .servers import LogprobServer
from .steps import apart, policy_loss_at, steps_of_values

check_version("verl", "0.9")

NAME = "sspo"  # of the estimator, the loss, the reward manager and the key of its extra info


def values_tensor(extra: str, length: int) -> Tensor:
    """(T,): the values of a reward manager's extra info at the first tokens of their steps, NaN elsewhere."""
    found = json.loads(extra)
    values = torch.full((length,), float("nan"))
    values[torch.tensor(found["starts"], dtype=torch.int64)] = torch.tensor(found["values"], dtype=torch.float32)
    return values


@core_algos.register_adv_est(NAME)
def sspo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config=None,
    index: np.ndarray | None = None,
    values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """GAE over steps beside an outcome baseline; options stand in `algorithm.sspo`: baseline, combine, step_scale."""
    if values is None:
        raise ValueError(
            "values: expected (B, T), from the reward manager 'sspo' or a critic's place in the batch, got None; "
            "is verl's compute_advantage not that of sspo_ext.integrations.verl?"
        )
    options = dict((config.get(NAME, None) if config is not None else None) or {})
    step_ids, values = steps_of_values(values, response_mask)
    steps = step_gae_tokens(values, token_level_rewards, step_ids, gamma=gamma, lam=lam)
    groups = None
    if index is not None:
        groups = torch.from_numpy(np.unique(np.asarray(index, str), return_inverse=True)[1]).to(values.device)
    outcome = outcome_advantages(token_level_rewards.sum(1), options.get("baseline", "grpo"), groups=groups)
    advantages = combine_advantages_tokens(
        steps, outcome, step_ids, options.get("combine", "add"), step_scale=options.get("step_scale", 1.0)
    )
    return apart(advantages, step_ids), advantages


_AGGREGATIONS = {
    "token-mean": "token", "token-sum": "sum", "seq-mean-token-sum": "sum", "seq-mean-token-sum-norm": "sum",
    "seq-mean-token-mean": "sequence",
}  # fmt: skip


def _loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
    *,
    level: str,
) -> tuple[Tensor, dict[str, Any]]:
    if loss_agg_mode not in _AGGREGATIONS:
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(_AGGREGATIONS)}, got {loss_agg_mode!r}")
    out = policy_loss_at(
        level, log_prob, old_log_prob, advantages, response_mask, aggregation=_AGGREGATIONS[loss_agg_mode],
        num_items=_num_items(loss_agg_mode, config, response_mask), importance_weights=rollout_is_weights,
        **_clip(config),
    )  # fmt: skip
    metrics = {f"actor/{name}": value.item() for name, value in out.metrics.items() if "ratio" in name}
    return out.loss, metrics


def _clip(config) -> dict[str, Any]:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return {"epsilon": low, "epsilon_high": high, "delta": config.get("clip_ratio_c", 3.0)}


def _num_items(mode: str, config, response_mask: Tensor):
    """What verl's `agg_loss` divides by, of the whole batch; ranks' gradients are averaged, hence the world size."""
    info = config.global_batch_info
    world = info.get("dp_size") or 1
    if mode == "token-sum":
        return 1 / world
    if mode == "token-mean":
        items = info.get("batch_num_tokens")
        items = response_mask.sum() if items is None else items
    else:
        items = info.get("global_batch_size")
        items = response_mask.any(1).sum() if items is None else items
        if mode == "seq-mean-token-sum-norm":
            items = items * (info.get("loss_scale_factor") or response_mask.shape[1])
    return items / world


for _name, _level in ((NAME, "step"), ("sspo_token", "token"), ("sspo_sequence", "sequence")):
    core_algos.register_policy_loss(_name)(functools.partial(_loss, level=_level))


@register(NAME)
class SSPORewardManager(NaiveRewardManager):
    """The naive manager's rewards, and values by probing a server that has the policy's weights.

    Options stand in `algorithm.sspo`: probe, server (the arguments of LogprobServer), split_by, reduce.
    """

    def __init__(self, config, tokenizer, compute_score, *args, **kwargs):
        super().__init__(config, tokenizer, compute_score, *args, **kwargs)
        self.options = config.algorithm[NAME]
        self.engine = LogprobServer(**self.options["server"])
        self.delimiters = delimiter_mask(tokenizer, self.options.get("split_by", "newline"))

    async def run_single(self, data) -> dict[str, Any]:
        """The reward of one response, and its values in the extra info."""
        found = await super().run_single(data)
        extra = await self.loop.run_in_executor(None, self.probe, data[-1:])
        found["reward_extra_info"][NAME] = extra
        return found

    def probe(self, data) -> str:
        """The values of one response's steps and the places of their first tokens, as JSON."""
        item = data[0]
        response, attention = item.batch["responses"], item.batch["attention_mask"]
        kept = attention[-len(response) :].bool()
        written = item.batch["response_mask"] if "response_mask" in item.batch.keys() else kept
        prompt = item.batch["prompts"][attention[: -len(response)].bool()]
        steps = step_ids_from_tokens(response, written.long() * kept, self.delimiters)
        whole = torch.cat([prompt, response[kept]])[None]
        ids = torch.cat([torch.full_like(prompt, -1), steps[kept]])[None]
        values = values_before_steps(
            None, StepBatch.from_tensors(whole, ids), as_probe(self.options["probe"]),
            [item.non_tensor_batch["reward_model"]["ground_truth"]], engine=self.engine, tokenizer=self.tokenizer,
            reduce=self.options.get("reduce", "joint"),
        ).to_lists()[0]  # fmt: skip
        starts = torch.searchsorted(steps.cummax(0).values, torch.arange(int(steps.max()) + 1)).tolist()
        return json.dumps({"starts": starts, "values": values[: len(starts)]})


def _wrap_output(as_dict):
    @functools.wraps(as_dict)
    def with_values(self):
        output = as_dict(self)
        extra = output.get("extra_fields", {}).get("reward_extra_info", {}).get(NAME)
        if extra is not None:
            output["values"] = values_tensor(extra, len(output["response_mask"]))
        return output

    return with_values


def _wrap_advantage(compute_advantage):
    @functools.wraps(compute_advantage)
    def with_sspo(data, adv_estimator, gamma=1.0, lam=1.0, *args, config=None, **kwargs):
        if adv_estimator != NAME:
            return compute_advantage(data, adv_estimator, gamma, lam, *args, config=config, **kwargs)
        mask = data.batch["response_mask"]
        values = data.batch.get("values", None)
        if values is None and NAME in data.non_tensor_batch:
            values = torch.stack([values_tensor(extra, mask.shape[1]) for extra in data.non_tensor_batch[NAME]])
        advantages, returns = sspo_advantage(
            data.batch["token_level_rewards"], mask, config, data.non_tensor_batch.get("uid"),
            None if values is None else values.to(mask.device), gamma, lam,
        )  # fmt: skip
        data.batch["advantages"], data.batch["returns"] = advantages, returns
        return data

    return with_sspo


ray_trainer.compute_advantage = _wrap_advantage(ray_trainer.compute_advantage)
agent_loop.AgentLoopOutput.as_dict = _wrap_output(agent_loop.AgentLoopOutput.as_dict)
