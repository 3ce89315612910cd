# SPDX-License-Identifier: Apache-2.0
"""Entropy, sum of squares and KL from step_logps and linear_step_logps: closed forms, gradcheck, both routes against
the specification in float64, torch.compile, and what is refused. The kernels: test_cpu_reductions.py and
test_triton_reductions.py.

Mutation of sspo_ext/reductions.py: the square's factor of 2 forgotten, seen by
test_gradcheck_of_the_specification_and_of_the_fused_gradient.
"""

import math

import pytest
import torch
from helpers.batch import random_batch
from helpers.linear import gemm_flops, problem
from helpers.opcheck import opcheck
from helpers.truth import assert_fp64_rule

from sspo_ext import backends
from sspo_ext.backends import ops, reference
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.losses.logps import linear_step_logps, step_logps

F64 = torch.float64
EVERYTHING = {"entropy": True, "sum_p2": True}


def test_closed_forms():
    """p = (1, 2, 5) / 8 and q = (2, 2, 4) / 8; a uniform row; a row with one possible token."""
    p, q = torch.tensor([1.0, 2.0, 5.0], dtype=F64) / 8, torch.tensor([2.0, 2.0, 4.0], dtype=F64) / 8
    possible = torch.tensor([-math.inf, 0.0, -math.inf], dtype=F64)
    logits = torch.stack([p.log(), torch.full((3,), 7.0, dtype=F64), possible])[None]
    ref = torch.stack([q.log(), p.log(), possible + 3])[None]
    entropy, sum_p2, kl = reference.row_reductions(logits, torch.arange(3), ref, 1.0, 0.0)
    h = sum(-x * math.log(x) for x in (1 / 8, 2 / 8, 5 / 8))
    assert entropy.tolist() == pytest.approx([h, math.log(3), 0.0], abs=1e-15)
    assert sum_p2.tolist() == pytest.approx([30 / 64, 1 / 3, 1.0], rel=1e-14)
    assert kl.tolist() == pytest.approx([0.25 * math.log(2) + 0.5 * math.log(4 / 5), math.log(3) - h, 0.0], abs=1e-15)
    # with temperature 1/2 the probabilities are 1, 4, 25 of 30
    entropy, sum_p2, _ = reference.row_reductions(logits[:, :1], torch.arange(1), None, 2.0, 0.0)
    assert entropy.item() == pytest.approx(-sum(x / 30 * math.log(x / 30) for x in (1, 4, 25)), rel=1e-14)
    assert sum_p2.item() == pytest.approx((1 + 16 + 625) / 900, rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"logit_softcap": 5.0, "logit_scale": 1.5}])
def test_gradcheck_of_the_specification_and_of_the_fused_gradient(backend, options):
    batch = random_batch(4, B=2, T=7, V=5, weighted=True, dtype=F64)
    batch.token_weights = batch.token_weights.double()
    ref, layout = torch.randn_like(batch.logits), batch.layout

    def values(name):
        def fn(logits):
            out = step_logps(logits, layout, kl_ref_logits=ref, backend=name, **EVERYTHING, **options)
            return out.sums, out.tokens, out.entropy, out.sum_p2, out.kl

        return fn

    leaf = batch.logits.requires_grad_()
    assert torch.autograd.gradcheck(values("reference"), leaf)
    assert torch.autograd.gradcheck(values(backend), leaf)


def logits_objective(logits, batch, ref, backend, **options):
    """A scalar of everything, each with other weights, and what it was made of."""
    out = step_logps(logits, batch.layout, kl_ref_logits=ref, backend=backend, **EVERYTHING, **options)
    values = (out.sums, out.tokens, out.entropy, out.sum_p2, out.kl)
    return weigh(values), values


def weigh(values):
    return sum(((i + 1) * v * torch.linspace(-1, 2, len(v), dtype=v.dtype)).sum() for i, v in enumerate(values))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_logits_route_equals_the_specification(backend, dtype, inplace):
    if backends.why_not(backend, "cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    batch = random_batch(1, V=211, weighted=True, dtype=dtype)
    ref = (batch.logits.float() + torch.randn_like(batch.logits.float())).to(dtype)
    results = []
    for x, r, name in ((batch.logits.double(), ref.double(), "reference"), (batch.logits, ref, "reference"),
                       (batch.logits, ref, backend)):  # fmt: skip
        leaf = x.clone().requires_grad_()
        more = {"inplace_backward": True} if inplace and name != "reference" else {}
        total, values = logits_objective(leaf * 1, batch, r, name, temperature=0.8, **more)
        total.backward()
        results.append([*(v.detach() for v in values), leaf.grad])
    for what, truth, other, got in zip(("sums", "tokens", "entropy", "sum_p2", "kl", "grad"), *results, strict=True):
        scale = 200.0 if dtype == F64 else None
        assert_fp64_rule(got, other, truth, 211, what, scale=scale)


@pytest.mark.parametrize("asked", ["entropy", "sum_p2", "kl"])
def test_each_alone_and_the_others_are_none(backend, asked):
    batch = random_batch(2)
    ref = torch.randn_like(batch.logits)
    every = step_logps(batch.logits, batch.layout, kl_ref_logits=ref, backend=backend, **EVERYTHING)
    options = {"kl_ref_logits": ref} if asked == "kl" else {asked: True}
    for name in (backend, "reference"):
        out = step_logps(batch.logits, batch.layout, backend=name, **options)
        for field in ("entropy", "sum_p2", "kl"):
            value = getattr(out, field)
            assert (value is None) == (field != asked)
    got = getattr(step_logps(batch.logits, batch.layout, backend=backend, **options), asked)
    assert torch.equal(got, getattr(every, asked)), "the same bits, whatever else is asked for"
    leaf = batch.logits.clone().requires_grad_()
    getattr(step_logps(leaf, batch.layout, backend=backend, **options), asked).sum().backward()
    truth = batch.logits.double().requires_grad_()
    more = {"kl_ref_logits": ref.double()} if asked == "kl" else options
    getattr(step_logps(truth, batch.layout, backend="reference", **more), asked).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


def test_not_asked_for_nothing_changes(backend, monkeypatch):
    """No other kernel runs, and no field is filled."""
    batch = random_batch(2)

    def refuse(*args):
        raise AssertionError("a kernel with reductions ran")

    monkeypatch.setattr(backends.load(backend), "row_reductions_fwd", refuse)
    out = step_logps(batch.logits, batch.layout, backend=backend)
    assert out.entropy is None and out.sum_p2 is None and out.kl is None


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (1, 1, 1)], ids=["frozen head", "head alone", "all"])
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_linear_route_equals_the_specification(backend, needs, chunk_bytes):
    batch = random_batch(3, weighted=True)
    layout = batch.layout
    p = problem(batch.labels.shape)
    other = problem(batch.labels.shape, H=7, seed=1)
    results = []
    for dtype, name in ((F64, "reference"), (torch.float32, "reference"), (torch.float32, backend)):
        leaves = p.leaves(needs, dtype)
        chunks = {} if name == "reference" else {"chunk_bytes": chunk_bytes}
        out = linear_step_logps(
            leaves[0], leaves[1], layout, bias=leaves[2], kl_ref_hidden=other.hidden.to(dtype),
            kl_ref_weight=other.weight.to(dtype), kl_ref_bias=other.bias.to(dtype), backend=name, logit_softcap=6.0,
            **EVERYTHING, **chunks,
        )  # fmt: skip
        values = (out.sums, out.tokens, out.entropy, out.sum_p2, out.kl)
        weigh(values).backward()
        results.append([*(v.detach() for v in values), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for i, (truth, yardstick, got) in enumerate(zip(*results, strict=True)):
        assert_fp64_rule(got, yardstick, truth, 37 * 13, f"value {i}")


def test_linear_route_takes_this_head_for_the_reference_by_default(backend):
    batch = random_batch(3)
    p = problem(batch.labels.shape)
    ref_hidden = torch.randn_like(p.hidden)
    default = linear_step_logps(p.hidden, p.weight, batch.layout, bias=p.bias, kl_ref_hidden=ref_hidden)
    given = linear_step_logps(
        p.hidden, p.weight, batch.layout, bias=p.bias, kl_ref_hidden=ref_hidden, kl_ref_weight=p.weight,
        kl_ref_bias=p.bias,
    )  # fmt: skip
    assert torch.equal(default.kl, given.kl) and default.entropy is None
    same = linear_step_logps(p.hidden, p.weight, batch.layout, kl_ref_hidden=p.hidden)
    assert (same.kl < 1e-6).all()


def test_linear_weight_grad_and_half_precision(backend):
    batch = random_batch(3)
    p = problem(batch.labels.shape, hidden_dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    kept, seen = [], []
    for buffer in (None, torch.zeros(p.weight.shape)):
        hidden, weight, _ = p.leaves((1, 1, 0))
        out = linear_step_logps(hidden, weight, batch.layout, entropy=True, weight_grad=buffer, chunk_bytes=2000)
        assert out.entropy.dtype == torch.float32
        out.entropy.sum().backward()
        kept.append(hidden.grad)
        seen.append(weight.grad if buffer is None else buffer)
    assert torch.equal(*kept)
    torch.testing.assert_close(seen[0].float(), seen[1], rtol=0.02, atol=0.02)


def test_products_of_the_linear_route(backend):
    """What the docstring says: 1 without gradients, 3 with a frozen head, 4 with a trained one; KL one more a way."""
    batch = random_batch(3)
    p, rows = problem(batch.labels.shape, bias=False), batch.layout.num_rows
    product = 2 * rows * 37 * 13
    for needs, ref, expected in (
        ((0, 0, 0), None, 1), ((1, 0, 0), None, 3), ((1, 1, 0), None, 4), ((0, 0, 0), p.hidden, 2),
        ((1, 0, 0), p.hidden, 5), ((1, 1, 0), p.hidden, 6),
    ):  # fmt: skip
        hidden, weight, _ = p.leaves(needs)

        def step(hidden=hidden, weight=weight, ref=ref, backward=1 in needs):
            out = linear_step_logps(hidden, weight, batch.layout, entropy=True, kl_ref_hidden=ref)
            if backward:
                (out.entropy if ref is None else out.entropy + out.kl).sum().backward()

        assert gemm_flops(step) == expected * product, (needs, ref is not None)
        plan = pref_plan(
            batch.layout,
            vocab=37,
            hidden=13,
            hidden_gradient=bool(needs[0]),
            weight_gradient=bool(needs[1]),
            reductions=True,
        )
        if ref is None:
            assert plan.flops == expected * product


def test_nothing_to_score(backend):
    layout = StepLayout.from_step_ids(torch.full((2, 3), -100), torch.full((2, 3), -1))
    logits = torch.randn(2, 3, 5, requires_grad=True)
    out = step_logps(logits, layout, kl_ref_logits=logits.detach(), backend=backend, **EVERYTHING)
    (out.entropy.sum() + out.sum_p2.sum() + out.kl.sum() + out.sums.sum()).backward()
    assert out.entropy.shape == (0,) and (logits.grad == 0).all()


def test_refused(backend):
    batch = random_batch(0)
    args = (batch.logits, batch.layout)
    with pytest.raises(TypeError, match="kl_ref_logits: expected torch.float32, as the logits are"):
        step_logps(*args, kl_ref_logits=batch.logits.double())
    with pytest.raises(ValueError, match="kl_ref_logits: expected shape"):
        step_logps(*args, kl_ref_logits=batch.logits[..., :-1])
    with pytest.raises(TypeError, match="kl_ref_logits: expected a torch.Tensor"):
        step_logps(*args, kl_ref_logits=[1.0])
    p = problem(batch.labels.shape)
    linear = (p.hidden, p.weight, batch.layout)
    with pytest.raises(ValueError, match="kl_ref_hidden: expected the reference's hidden states"):
        linear_step_logps(*linear, kl_ref_weight=p.weight)
    with pytest.raises(ValueError, match="kl_ref_weight: expected shape"):
        linear_step_logps(*linear, kl_ref_hidden=p.hidden, kl_ref_weight=p.weight[:-1])
    with pytest.raises(ValueError, match="kl_ref_hidden: expected shape"):
        linear_step_logps(*linear, kl_ref_hidden=p.hidden[:, 1:])
    leaf = batch.logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(step_logps(leaf, batch.layout, entropy=True).entropy.sum(), leaf, create_graph=True)


def test_a_backend_without_the_kernels(monkeypatch):
    """Named, it is refused with what to use; "auto" takes the reference."""
    monkeypatch.setattr(backends.load("cpu"), "row_reductions_fwd", None)
    monkeypatch.delattr(backends.load("cpu"), "row_reductions_fwd")
    batch = random_batch(0)
    with pytest.raises(ValueError, match="backend: 'cpu' has no entropy"):
        step_logps(batch.logits, batch.layout, entropy=True, backend="cpu")
    out = step_logps(batch.logits, batch.layout, entropy=True)
    assert torch.equal(out.entropy, step_logps(batch.logits, batch.layout, entropy=True, backend="reference").entropy)


# ---- torch.library and torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    batch = random_batch(0, B=2, T=7, dtype=dtype)
    layout, ref = batch.layout, torch.randn(2, 7, 11).to(dtype)
    for given, *wanted in ((ref, True, True), (None, True, True), (ref, False, False), (None, True, False)):
        args = (batch.logits, layout.rows, layout.labels, given, 0.7, 5.0, *wanted, backend)
        opcheck(ops.row_reductions_fwd, args, dtype)
        _, lse, *_, ref_lse = ops.row_reductions_fwd(*args)
        coefs = torch.randn(layout.num_rows, 5)
        args = (batch.logits, layout.row_of, layout.labels, lse, given, ref_lse, coefs, 0.7, 5.0, backend)
        opcheck(ops.row_reductions_bwd, args, dtype)
        opcheck(ops.row_reductions_bwd_, (batch.logits.clone(), *args[1:]), dtype)


@pytest.mark.parametrize("with_ref", [True, False], ids=["everything", "entropy alone"])
@pytest.mark.parametrize("route", ["logits", "linear"])
def test_compiled_equals_eager_bitwise(backend, route, with_ref):
    torch._dynamo.reset()
    batch = random_batch(1, weighted=True)
    p = problem(batch.labels.shape)
    layout = batch.layout
    start, ref = (batch.logits, torch.randn_like(batch.logits)) if route == "logits" else (p.hidden, p.hidden * 0.9)

    def fn(x):
        if not with_ref and route == "logits":
            return step_logps(x, layout, entropy=True, backend=backend).entropy.sum()
        if not with_ref:
            return linear_step_logps(x, p.weight, layout, entropy=True, backend=backend).entropy.sum()
        if route == "logits":
            out = step_logps(x, layout, kl_ref_logits=ref, backend=backend, **EVERYTHING)
        else:
            out = linear_step_logps(x, p.weight, layout, bias=p.bias, kl_ref_hidden=ref, backend=backend, **EVERYTHING)
        return weigh((out.sums, out.tokens, out.entropy, out.sum_p2, out.kl))

    results = []
    for call in (torch.compile(fn, fullgraph=True, backend="aot_eager"), fn):
        leaf = start.detach().clone().requires_grad_()
        value = call(leaf * 1)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
