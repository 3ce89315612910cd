# SPDX-License-Identifier: Apache-2.0
"""A worker of verl's single controller that trains a tiny model, and the batch that it learns from."""

import numpy as np
import ray
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo import core_algos, ray_trainer
from verl.workers.config import ActorConfig

from helpers.rl import make_model, parameters

LENGTHS = [[2, 1, 3], [4], [1, 1], [1, 2, 1, 1]]


def batch(model):
    """Prompts of two tokens, responses in steps, old log-probs and, by verl's compute_advantage, advantages."""
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 20, (4, 9), generator=g), torch.zeros(4, 7, dtype=torch.int64)
    values, rewards = torch.full((4, 7), float("nan")), torch.zeros(4, 7)
    for b, lengths in enumerate(LENGTHS):
        mask[b, : sum(lengths)] = 1
        values[b, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = torch.rand(len(lengths), generator=g)
        rewards[b, sum(lengths) - 1] = float(b % 2)
    with torch.no_grad():
        old = log_probs(model, ids) + 0.1 * torch.randn(4, 7, generator=g)
    data = DataProto.from_single_dict(
        {"ids": ids, "response_mask": mask, "values": values, "token_level_rewards": rewards, "old_log_probs": old}
    )
    data.non_tensor_batch["uid"] = np.array(["a", "a", "b", "b"], dtype=object)
    config = OmegaConf.create({"sspo": {"baseline": "grpo"}})
    return ray_trainer.compute_advantage(data, adv_estimator="sspo", gamma=0.9, lam=0.8, config=config)


def log_probs(model, ids):
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logp[:, 1:]


def update(model, data, world):
    """One SGD step of this share of the batch, gradients averaged over the processes."""
    config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, ppo_mini_batch_size=4)
    config.global_batch_info.update(dp_size=world, batch_num_tokens=sum(map(sum, LENGTHS)))
    loss, _ = core_algos.get_policy_loss_fn("sspo")(
        old_log_prob=data.batch["old_log_probs"], log_prob=log_probs(model, data.batch["ids"]),
        advantages=data.batch["advantages"], response_mask=data.batch["response_mask"], config=config,
    )  # fmt: skip
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if world > 1:
                torch.distributed.all_reduce(p.grad)
            p -= 0.05 * p.grad / world
            p.grad = None
    return parameters(model)


@ray.remote
class Learner(Worker):
    def __init__(self):
        super().__init__()
        torch.distributed.init_process_group("gloo", rank=self.rank, world_size=self.world_size)
        self.model = make_model()

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def learn(self, data: DataProto) -> DataProto:
        weights = update(self.model, data, self.world_size)
        return DataProto.from_single_dict({"weights": weights[None]})
