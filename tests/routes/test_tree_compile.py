# SPDX-License-Identifier: Apache-2.0
"""Trees of sequences under torch.compile, and their ops under torch.library's checks.

Mutations of sspo_ext/routes, each caught by the test named (on a copy of the package):
  the number of rows a constant of the graph   test_compiled_equals_eager
  fake with the rows of tokens                 test_opcheck
"""

import pytest
import torch
from helpers.linear import problem
from helpers.opcheck import opcheck
from helpers.tree import losses, pairs_of, random_tree
from torch._dynamo.testing import CompileCounterWithBackend

from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.routes import tree_rows
from sspo_ext.routes.linear import ops as linear_ops
from sspo_ext.routes.linear import policy as linear_policy

V, H = 37, 8


@pytest.mark.parametrize("name", ["pair", "entropy"])
def test_compiled_equals_eager(backend, name):
    """Trees of two rows whose other sizes all differ; the third needs no graph of its own."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for n, seed in enumerate((2, 18, 10)):
        batch = random_tree(seed, V=V)
        loss = losses(batch)[name]
        if n == 0:
            compiled = torch.compile(lambda fn, x, layout: fn(x * 1, layout, backend=backend), fullgraph=True,
                                     backend=counter)  # fmt: skip
        ours, eager = (batch.logits.clone().requires_grad_() for _ in range(2))
        got, want = compiled(loss, ours, batch.layout), loss(eager * 1, batch.layout, backend=backend)
        got.backward()
        want.backward()
        assert torch.equal(got, want) and torch.equal(ours.grad, eager.grad)
    assert counter.frame_count == 2  # the second with sizes that vary
    torch._dynamo.reset()


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize("module, op", [
    (linear_ops, "linear_pref_fwd"), (linear_ops, "linear_logps_fwd"), (linear_ops, "linear_logps_bwd"),
    (linear_policy, "linear_policy_fwd"), (tree_rows, "add_in_order"),
])  # fmt: skip
def test_opcheck(monkeypatch, module, op, needs):
    """With the very arguments that the public functions pass."""
    calls, real = [], getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: (calls.append(args), real(*args))[1])
    batch = random_tree(0, V=V, weighted=True)
    layout, p = batch.layout, problem(batch.tree.shape, V, H)
    hidden, weight, bias = p.leaves(needs)
    options = {"bias": bias, "chunk_bytes": 6 * V * 4, "backend": "cpu"}
    pair = linear_step_pref_loss(hidden, weight, layout, pairs_of(layout), reference_free=True, **options).loss
    policy = linear_step_policy_loss(hidden, weight, layout, torch.ones(layout.num_steps), **options).loss
    (pair + policy + linear_step_logps(hidden, weight, layout, **options).sums.sum()).backward()
    if op == "linear_logps_bwd" and not needs[1] or op == "linear_policy_fwd" and not needs[1]:
        assert not calls  # a frozen head's directions are known in forward
    else:
        assert calls
    for args in calls:
        opcheck(real, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
def test_compiled_linear(backend, needs):
    torch._dynamo.reset()
    batch = random_tree(0, V=V)
    p, pairs = problem(batch.tree.shape, V, H), pairs_of(batch.layout)
    advantages = torch.ones(batch.layout.num_steps)

    def pair(hidden, weight, bias):
        return linear_step_pref_loss(
            hidden, weight, batch.layout, pairs, bias=bias, reference_free=True, backend=backend
        ).loss

    def policy(hidden, weight, bias):
        return linear_step_policy_loss(hidden, weight, batch.layout, advantages, bias=bias, backend=backend).loss

    def logps(hidden, weight, bias):
        out = linear_step_logps(hidden, weight, batch.layout, bias=bias, entropy=True, backend=backend)
        return out.sums.sum() + out.entropy.sum()

    for fn in (pair, policy, logps):
        results = []
        for call in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            leaves = p.leaves(needs)
            loss = call(*leaves)
            loss.backward()
            results.append([loss.detach(), *(t.grad for t in leaves if t.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()
