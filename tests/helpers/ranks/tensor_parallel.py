# SPDX-License-Identifier: Apache-2.0
"""What each process of routes/linear/test_tensor_parallel.py runs."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.linear import Problem, pairs_of, problem
from sspo_ext.layout.steps import StepLayout
from sspo_ext.layout.tree import TokenTree
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss

SHAPE, H = (4, 10), 9


@dataclass
class Case:
    """One call on `world` processes. `V` is the whole vocabulary; `rows` those of a chunk on the largest shard."""

    world: int
    V: int
    kind: str = "megatron"  # or "dtensor"
    needs: tuple[int, int, int] = (1, 1, 1)
    rows: int = 1000
    dtype: torch.dtype = torch.float32
    logps: bool = False
    ask: str = ""  # or "reductions", "same head" (for the reference of KL) or "policy"
    forbidden: int = 0  # last rows of the vocabulary with a bias of -inf, which Megatron pads a vocabulary with
    buffer: bool = False
    tree: bool = False  # sequences with common beginnings, as a tree
    upstream: float = 1.0
    options: dict = field(default_factory=dict)


CASES = {
    f"{kind}, {world}, {name}": Case(world, V, kind, **more)
    for kind, world, V in (("megatron", 2, 40), ("megatron", 4, 40), ("dtensor", 2, 37), ("dtensor", 4, 37))
    for name, more in {
        "all": {},
        "frozen": {"needs": (1, 0, 0), "rows": 6},
        "recompute": {"rows": 3, "upstream": -0.7},
        "no gradient": {"needs": (0, 0, 0), "rows": 6},
        "step log-probs": {"logps": True, "rows": 6},
        "step log-probs, frozen": {"logps": True, "needs": (1, 0, 0)},
        "weight alone": {"needs": (0, 1, 0), "rows": 6},
        "softcap": {"options": {"logit_softcap": 4.0, "temperature": 0.8}, "rows": 6},
        "bfloat16": {"dtype": torch.bfloat16, "rows": 6},
        "float64": {"dtype": torch.float64, "rows": 6},
        "buffer": {"buffer": True, "rows": 6},
    }.items()
}
CASES |= {
    f"{kind}, {world}, {name}": Case(world, V, kind, **more)
    for kind, world, V in (("megatron", 2, 40), ("megatron", 4, 40), ("dtensor", 2, 37), ("dtensor", 4, 37))
    for name, more in {
        "reductions": {"ask": "reductions", "rows": 6},
        "reductions, float64": {"ask": "reductions", "rows": 6, "dtype": torch.float64},
        "reductions, frozen": {"ask": "reductions", "rows": 6, "needs": (1, 0, 0)},
        "reductions, no gradient": {"ask": "reductions", "needs": (0, 0, 0)},
        "reductions, softcap": {"ask": "same head", "options": {"logit_softcap": 4.0, "temperature": 0.8}},
        "policy": {"ask": "policy", "rows": 6, "upstream": -0.7},
        "policy, recompute, float64": {"ask": "policy", "rows": 2, "dtype": torch.float64},
        "policy, no gradient": {"ask": "policy", "rows": 6, "needs": (0, 0, 0)},
    }.items()
}
CASES |= {
    f"{kind}, 2, tree, {name}": Case(2, V, kind, tree=True, **more)
    for kind, V in (("megatron", 40), ("dtensor", 37))
    for name, more in {
        "all": {},
        "frozen": {"needs": (1, 0, 0), "rows": 6},
        "recompute": {"rows": 3, "upstream": -0.7},
        "step log-probs": {"logps": True, "rows": 6},
        "reductions": {"ask": "reductions", "rows": 6},
        "policy": {"ask": "policy", "rows": 6, "upstream": -0.7},
    }.items()
}
CASES["megatron, 4, reductions, a forbidden shard"] = Case(4, 40, ask="reductions", forbidden=13)
CASES["megatron, 4, policy, a forbidden shard"] = Case(4, 40, ask="policy", rows=6, forbidden=10)
CASES["dtensor, 4, reductions, a shard without rows"] = Case(4, 5, "dtensor", ask="reductions", rows=6)
CASES["dtensor, 4, a shard without rows"] = Case(4, 5, "dtensor", rows=6)
CASES["dtensor, 2, one label in all"] = Case(2, 2, "dtensor")


def inputs(case: Case) -> tuple[StepLayout, object, Problem]:
    """The same on every rank and in the parent."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, case.V - case.forbidden, SHAPE, generator=g)
    ids = (torch.arange(SHAPE[1]) - 2).div(3, rounding_mode="floor").clamp(min=-1).expand(SHAPE).contiguous()
    weights, sequences = torch.rand(SHAPE, generator=g) + 0.5, [slice(0, n) for n in (10, 10, 10, 9)]
    if case.tree:
        labels[1, :5], labels[2, :7], labels[3, :8] = labels[0, :5], labels[0, :7], labels[0, :8]
        tokens, steps, own = ([t[b, s] for b, s in enumerate(sequences)] for t in (labels, ids, weights))
        layout = StepLayout.from_tree(TokenTree.from_sequences(tokens), tokens, steps, token_weights=own)
    else:
        layout = StepLayout.from_step_ids(labels, ids, token_weights=weights)
    pairs = pairs_of(layout, (0, 3), (1, 4), (1, 7), (6, 9), (8, 11))
    p = problem(layout.shape, case.V, H, hidden_dtype=case.dtype, weight_dtype=case.dtype, scale=2.0)
    p.bias[case.V - case.forbidden :] = -math.inf
    return layout, pairs, p


def kl_reference(case: Case, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Hidden states, and with a head of its own weight and bias."""
    width = H if case.ask == "same head" else H + 2
    p = problem(shape, case.V, width, seed=7, hidden_dtype=case.dtype, weight_dtype=case.dtype, scale=2.0)
    p.bias[case.V - case.forbidden :] = -math.inf
    return (p.hidden,) if case.ask == "same head" else (p.hidden, p.weight, p.bias)


def call(case: Case, leaves, layout, pairs, kl_ref=None, **more) -> tuple[Tensor, Tensor]:
    """(loss, what every rank must agree on). `kl_ref`: this rank's part of `kl_reference`."""
    largest = -(-case.V // case.world)
    more = {**more, **case.options, "chunk_bytes": case.rows * largest * case.dtype.itemsize, "bias": leaves[2]}
    if case.ask == "policy":
        constants = {name: torch.linspace(-20, -10, layout.num_rows) for name in ("old", "ref")}
        more |= dict(
            loss_type="ppo", epsilon_high=50.0, importance_sampling_level="step", kl_coef=0.2, entropy_coef=0.7
        )
        out = linear_step_policy_loss(*leaves[:2], layout, torch.linspace(1, 2, layout.num_steps), **constants, **more)
        return out.loss, torch.stack([out.tokens, out.entropy])
    if case.ask:
        kl_ref = [t.to(leaves[0].dtype) for t in kl_reference(case, layout.shape)] if kl_ref is None else kl_ref
        names = ("kl_ref_hidden", "kl_ref_weight", "kl_ref_bias")
        reference = dict(zip(names, kl_ref, strict=False))
        out = linear_step_logps(*leaves[:2], layout, entropy=True, sum_p2=True, **reference, **more)
        values = torch.stack([out.tokens, out.entropy, out.sum_p2, out.kl])
        factors = torch.linspace(0.5, 1.5, layout.num_rows) * torch.tensor([-1.3, 0.7, 2.1, 0.9])[:, None]
        return (values * factors.to(values.dtype)).sum() / 10, values.detach()
    if case.logps:
        out = linear_step_logps(*leaves[:2], layout, **more)
        factors = torch.arange(1, layout.num_steps + 1, dtype=out.sums.dtype)
        return (out.sums * factors).sum() / 100, out.tokens.detach()
    out = linear_step_pref_loss(*leaves[:2], layout, pairs, **more)
    return out.loss, out.step_logps


def run_case(case: Case, group, mesh, rank: int) -> dict[str, Tensor | None]:
    layout, pairs, p = inputs(case)
    hidden, weight, bias = p.leaves(case.needs)
    size = -(-case.V // case.world)
    mine = slice(rank * size, min((rank + 1) * size, case.V))
    if case.kind == "megatron":
        weight, bias = (t.detach()[mine].clone().requires_grad_(t.requires_grad) for t in (weight, bias))
    else:
        from torch.distributed.tensor import Shard, distribute_tensor

        weight, bias = (
            distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_(t.requires_grad) for t in (weight, bias)
        )
    rows = len(range(*mine.indices(case.V)))
    buffer = torch.ones(rows, H, dtype=case.dtype) if case.buffer else None
    more = {} if buffer is None else {"weight_grad": buffer}
    if case.ask in ("reductions", "same head"):
        ref_hidden, *ref_head = kl_reference(case, layout.shape)
        more["kl_ref"] = [ref_hidden, *(t[mine] for t in ref_head)]
        if case.kind == "dtensor":
            more["kl_ref"][1:] = [distribute_tensor(t, mesh, [Shard(0)]) for t in ref_head]
    loss, agreed = call(case, (hidden, weight, bias), layout, pairs, tp_group=group, backend="cpu", **more)
    if loss.requires_grad:
        (loss * case.upstream).backward()

    def local(grad):
        return grad.to_local() if hasattr(grad, "to_local") else grad

    d_weight = local(weight.grad) if buffer is None else buffer - 1
    # None, or zeros, which torch 2.6 makes of it where a DTensor became a plain one
    assert buffer is None or weight.grad is None or not local(weight.grad).any()
    return {
        "loss": loss.detach(),
        "agreed": agreed,
        "hidden": hidden.grad,
        "weight": d_weight,
        "bias": local(bias.grad),
    }


def refusals(group, mesh) -> dict[str, str]:
    """Calls that must raise before any rank waits for another."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layout, pairs, p = inputs(Case(2, 36))
    shard = p.weight[:18]
    replicated = distribute_tensor(p.weight, mesh, [Replicate()])
    columns = distribute_tensor(p.weight, mesh, [Shard(1)])
    sharded = distribute_tensor(p.weight, mesh, [Shard(0)])
    messages = {}
    for name, weight, more in (
        ("replicated", replicated, {"tp_group": group}),
        ("columns", columns, {"tp_group": group}),
        ("unsaid", sharded, {}),
        ("reference", shard, {"tp_group": group, "backend": "reference"}),
    ):
        try:
            linear_step_pref_loss(p.hidden, weight, layout, pairs, **more)
            messages[name] = "did not raise"
        except (ValueError, TypeError) as error:
            messages[name] = str(error)
    return messages


def worker(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    # a rank that waits for a collective that no other enters fails instead of hanging
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    groups, meshes = {4: dist.group.WORLD, 2: dist.new_group([0, 1])}, {}
    meshes[4] = DeviceMesh("cpu", [0, 1, 2, 3])
    meshes[2] = DeviceMesh("cpu", [0, 1]) if rank < 2 else None
    results = {}
    for name, case in CASES.items():
        if rank < case.world:
            group = groups[case.world] if case.kind == "megatron" else meshes[case.world].get_group()
            try:
                results[name] = run_case(case, group, meshes[case.world], rank)
            except Exception as error:  # told by the test of this case, so that the others still run
                results[name] = f"{type(error).__name__}: {error}"
    if rank < 2:
        results["refusals"] = refusals(groups[2], meshes[2])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
