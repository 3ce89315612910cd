# SPDX-License-Identifier: Apache-2.0
"""What each process of losses/test_state.py runs."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.common import all_reduce
from sspo_ext.losses.pref import pref_loss
from sspo_ext.losses.state import RewardMean
from sspo_ext.losses.transport import aot_loss, aot_unpaired_loss
from sspo_ext.losses.unpaired import kto_reference_point
from sspo_ext.objective.sums import StepLogps, sums_over_steps

F64 = torch.float64


def batch(first: int, count: int):
    """Steps first .. first + count of a table that all ranks know: the tokens are the leaf that gradients are of."""
    g = torch.Generator().manual_seed(0)
    table = -torch.rand(16, 2, generator=g, dtype=F64) * 3
    refs = -torch.rand(16, generator=g, dtype=F64) * 6
    labels = torch.zeros(count, 3, dtype=torch.int64)
    layout = StepLayout.from_step_ids(labels, torch.tensor([[-1, 0, 0]]).expand(count, 3))
    tokens = table[first : first + count].reshape(-1).clone().requires_grad_()
    logps = StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens)
    half = count // 2
    pairs = StepPairs.from_index(layout, torch.stack([torch.arange(half), torch.arange(half) + half], 1))
    return logps, layout, pairs, refs[first : first + count]


def results(logps, layout, pairs, ref, group=None) -> dict:
    out = {"z0": kto_reference_point(logps, layout, ref - 1.0, group=group)}
    for name, fn in (("aot", aot_loss), ("aot_unpaired", aot_unpaired_loss)):
        loss = fn(logps, layout, pairs, ref=ref, beta=0.5, group=group).loss
        (grad,) = torch.autograd.grad(loss, logps.tokens, retain_graph=True)
        out[name] = (loss.detach(), grad)
    shift = RewardMean()
    for beta in (0.5, 0.2):
        pref = pref_loss(
            logps, layout, pairs, ref=ref, beta=beta, loss_type="bco_pair", margins=shift.margins(pairs).double()
        )
        shift.update(pref, group)
    out["shift"], out["count"] = shift.mean, shift.count
    return out


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    mine = batch(8 * rank, 8)
    given = torch.tensor([1.0 + rank])
    assert all_reduce(given, dist.group.WORLD).item() == 3.0 and given.item() == 1.0 + rank
    torch.save(results(*mine, group=dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
