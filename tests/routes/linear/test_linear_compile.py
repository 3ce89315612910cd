# SPDX-License-Identifier: Apache-2.0
"""The linear route under torch.compile: ops that pass opcheck, no graph break, eager's results, no recompile for
another batch.

Mutations of sspo_ext/linear_ops.py, and the test that catches each:
* fake with another size of coef, one empty tensor returned twice, fake lse in float32: test_opcheck
"""

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.linear import problem
from helpers.opcheck import opcheck
from torch._dynamo.testing import CompileCounterWithBackend

from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.routes.linear import ops as linear_ops

V, H = 19, 6
NEEDS = {"none": (0, 0, 0), "frozen": (1, 0, 0), "trained": (1, 1, 0), "all": (1, 1, 1), "weight": (0, 1, 0)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(seed, B=4, T=12, dtype=torch.float32, weighted=True):
    b = random_batch(seed, B, T, V, weighted=weighted)
    layout = b.layout
    return layout, random_pairs(layout, seed), problem((B, T), V, H, seed=seed, hidden_dtype=dtype, weight_dtype=dtype)


# ---- ops


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["linear_pref_fwd", "linear_logps_fwd", "linear_logps_bwd"])
def test_opcheck(monkeypatch, op, needs, dtype):
    """With the very arguments that the public functions pass: schema, aliasing, fakes (shapes, dtypes, strides),
    tracing."""
    calls = []
    real = getattr(linear_ops, op)
    monkeypatch.setattr(linear_ops, op, lambda *args: (calls.append(args), real(*args))[1])
    layout, pairs, p = batch(0, dtype=dtype)
    leaves = p.leaves(NEEDS[needs])
    chunk_bytes = 5 * V * dtype.itemsize
    if op == "linear_pref_fwd":
        out = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=chunk_bytes).loss
    else:
        out = linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=chunk_bytes).sums.sum()
    if out.requires_grad:
        out.backward()
    if op == "linear_logps_bwd" and needs in ("none", "frozen"):
        assert not calls, "a frozen head needs no second look at the logits"
        return
    (args,) = calls
    opcheck(real, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), dtype)


# ---- whole functions


def pref(hidden, weight, bias, layout, pairs, ref):
    out = linear_step_pref_loss(
        hidden, weight, layout, pairs, bias=bias, ref=ref, chunk_bytes=5 * V * 4, logit_softcap=9.0
    )
    return out.loss, out.step_logps, out.metrics["rewards/margins"]


def logps(hidden, weight, bias, layout, pairs, ref):
    out = linear_step_logps(hidden, weight, layout, bias=bias, chunk_bytes=5 * V * 4, temperature=0.7)
    return (out.sums * ref).sum(), out.sums, out.tokens


def results(fn, p, needs, layout, pairs, ref):
    leaves = p.leaves(needs)
    out = fn(*leaves, layout, pairs, ref)
    if out[0].requires_grad:
        (out[0] * 1.5).backward()
    return [t.detach() for t in out] + [t.grad for t in leaves]


@pytest.mark.parametrize(
    "fn, needs", [(pref, "none"), (pref, "frozen"), (pref, "all"), (logps, "frozen"), (logps, "all")]
)
def test_fullgraph_equals_eager(fn, needs):
    layout, pairs, p = batch(1)
    ref = torch.randn(layout.num_steps, generator=torch.Generator().manual_seed(0))
    want = results(fn, p, NEEDS[needs], layout, pairs, ref)
    got = results(torch.compile(fn, fullgraph=True, backend="aot_eager"), p, NEEDS[needs], layout, pairs, ref)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # the kernels are the same; a product beside them may be taken in another order
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upstream_gradient_compiled(dtype):
    """A factor that the weight's dtype cannot hold."""
    layout, pairs, p = batch(2, dtype=dtype)

    def loss(*leaves):
        return linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], num_items=2e4).loss

    gradients = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = p.leaves()
        (fn(*leaves) * 65536.0).backward()
        gradients.append([t.grad for t in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.isfinite(compiled).all() and torch.count_nonzero(compiled) > 0
        torch.testing.assert_close(compiled, eager, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("needs", ["frozen", "all"])
def test_no_recompile_over_batches(needs):
    """Other numbers of rows, steps, pairs and positions: one graph for the first shape, one with all of them
    dynamic."""
    counter = CompileCounterWithBackend("eager")
    fn = torch.compile(pref, fullgraph=True, backend=counter)
    for seed, (B, T) in enumerate([(4, 12), (6, 23), (2, 31), (8, 14), (4, 40)]):
        layout, pairs, p = batch(seed, B, T)
        ref = torch.randn(layout.num_steps)
        got = results(fn, p, NEEDS[needs], layout, pairs, ref)
        torch.testing.assert_close(got[0], pref(*p.leaves(), layout, pairs, ref)[0].detach(), rtol=2e-7, atol=1e-9)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for 5 batches"


def test_whole_training_step_compiles():
    """A small model with tied embeddings around the loss."""
    layout, pairs, _ = batch(3)
    ids = torch.randint(0, V, (4, 12), generator=torch.Generator().manual_seed(0))
    table = torch.randn(V, H, generator=torch.Generator().manual_seed(1))

    def loss(table):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table))
        return linear_step_pref_loss(hidden, table, layout, pairs, chunk_bytes=5 * V * 4).loss

    gradients = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = table.clone().requires_grad_()
        fn(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
