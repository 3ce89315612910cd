# SPDX-License-Identifier: Apache-2.0
"""Policy losses that every route is held to."""

import torch

from helpers.batch import random_batch
from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.losses.logps import step_logps

# name -> loss type, level, length_normalize, options
VARIANTS = {
    "reinforce": {"loss_type": "reinforce"},
    "ppo": {"loss_type": "ppo"},
    "clip-higher": {"loss_type": "ppo", "epsilon": 0.1, "epsilon_high": 0.3},
    "dual-clip": {"loss_type": "ppo", "epsilon": 0.1, "delta": 1.2},
    "step": {"loss_type": "ppo", "importance_sampling_level": "step", "epsilon": 0.05},
    "step-product": {"loss_type": "ppo", "importance_sampling_level": "step", "length_normalize": False},
    "gspo": {"loss_type": "ppo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    "rloo": {"loss_type": "ppo", "importance_sampling_level": "sequence", "length_normalize": False},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
}
AGGREGATIONS = ("token", "step", "sequence", "sum")


def with_old(options, old):
    # not `|`, which torch.compile of torch 2.6 does not take
    return {**options, **({"old": old} if POLICY_FORMULAS[options["loss_type"]].has_ratio else {})}


F64 = torch.float64


def problem(seed=0, B=4, T=14, V=11, dtype=F64, weighted=False):
    """Batch, layout, one advantage a step, and old and reference log-probs near the policy's, (N,)."""
    batch = random_batch(seed, B, T, V, weighted=weighted, dtype=dtype)
    layout = batch.layout
    g = torch.Generator().manual_seed(seed + 1)
    advantages = torch.randn(layout.num_steps, generator=g, dtype=F64).to(dtype)
    tokens = step_logps(batch.logits, layout, backend="reference").tokens
    old, ref = (tokens + torch.randn(tokens.shape, generator=g, dtype=F64).to(tokens.dtype) * s for s in (0.2, 0.3))
    return batch, layout, advantages, old, ref


def gradient(fn, logits):
    leaf = logits.detach().clone().requires_grad_()
    loss = fn(leaf)
    (loss * 1.7).backward()
    return loss.detach(), leaf.grad
