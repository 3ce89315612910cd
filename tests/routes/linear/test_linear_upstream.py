# SPDX-License-Identifier: Apache-2.0
"""The upstream gradient of the linear route: scales of the loss, what is kept for backward, several backwards.

Mutations of sspo_ext/routes, and the test that catches each:
* float16 gradients divided before the loss scale reaches them: test_upstream_gradient
* float16 gradients kept from forward: test_float16_overflows_where_the_logits_route_does
* kept gradient overwritten though the graph is kept: test_backward_twice
* upstream rounded to the kept dtype; rows of factor 0 not cleared: test_scaling_what_was_kept
* double backward not refused: test_second_derivative_is_refused
"""

import pytest
import torch
from helpers.linear import (
    GRADIENTS,
    errors,
    gemm_flops,
    layout_of_lengths,
    problem,
    truth_of,
)
from helpers.linear_route import BF16, F16, F32, F64, NAMES, SHAPE, H, V, assert_rule, budget, linear_route, units_batch

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss
from sspo_ext.routes import shared as autograd


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("upstream", [1 / 3, -2.0, 65536.0])
@pytest.mark.parametrize("gradients", ["hidden", "all"])
def test_upstream_gradient(dtype, upstream, gradients):
    """1/3: gradient accumulation, a factor that bfloat16 cannot hold. 65536: GradScaler's first scale, which
    float16 cannot hold."""
    layout, pairs, options = units_batch(seed=3)
    p = problem(SHAPE, V, H, hidden_dtype=dtype, weight_dtype=dtype)
    # small enough that scaled float16 gradients stay below 65504
    for rows in (10_000, 4):
        assert_rule(
            p,
            layout,
            pairs,
            needs=GRADIENTS[gradients],
            rows=rows,
            upstream=upstream,
            num_items=2e4 if upstream > 1e4 else None,
            **options,
        )


def test_float16_gradients_survive_a_small_scale():
    """With many items d loss/d logit is below float16's smallest number; the loss scale must reach it before it is
    rounded."""
    layout, pairs, options = units_batch(seed=3)
    p = problem(SHAPE, V, H, hidden_dtype=F16, weight_dtype=F16)
    for needs in ((1, 0, 0), (1, 1, 1)):
        exact = truth_of(p, layout, pairs, needs=needs, upstream=2.0**24, num_items=1e7, **options)
        got = linear_route(p, layout, pairs, needs=needs, upstream=2.0**24, num_items=1e7, **options)
        for name, a, t in zip(NAMES[1:], got[1:], exact[1:], strict=True):
            if a is not None:
                assert errors(a, t)[1] <= 5e-3 * t.square().mean().sqrt(), name


@pytest.mark.parametrize("rows", [10_000, 64])
@pytest.mark.parametrize("accum_dtype", [None, F16])
def test_float16_overflows_where_the_logits_route_does(accum_dtype, rows):
    """A gradient of 900,000 under a loss scale of 1/64: what the logits route holds, with the normaliser and the scale
    in every product, is held here too, in one product or in several."""
    g = torch.Generator().manual_seed(0)
    labels = torch.full((8, 257), 3)
    labels[4:] = torch.randint(0, 64, (4, 257), generator=g)
    layout = StepLayout.from_step_ids(labels, torch.zeros_like(labels))
    hidden, weight = torch.randn(8, 257, 16, generator=g) * 0.3 + 3, torch.randn(64, 16, generator=g) * 0.05
    ref = torch.full((layout.num_steps,), -400.0)  # a difference of 700, squared by the head

    def gradients(linear):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", F16):
            if linear:
                chunk = {"chunk_bytes": budget(rows, F16, 64), "accum_dtype": accum_dtype}
                loss = linear_step_pref_loss(*leaves, layout, ref=ref, loss_type="sppo_hard", **chunk).loss
            else:
                logits = torch.nn.functional.linear(*leaves)
                loss = step_pref_loss(logits, layout, ref=ref, loss_type="sppo_hard").loss
        (loss / 64).backward()
        return [t.grad for t in leaves]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert want.isfinite().all() and want.abs().max() > 0
        assert (got - want).abs().max() <= 2e-3 * want.abs().max()


def test_float16_trains_in_four_products():
    layout, pairs, options = units_batch(seed=3)
    leaves = problem(SHAPE, V, H, hidden_dtype=F16, weight_dtype=F16).leaves()
    plan = pref_plan(layout, pairs, vocab=V, hidden=H, dtype=F16)
    assert plan.gemm_rows == 4 * layout.num_rows

    def step():
        linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss.backward()

    assert gemm_flops(step) == plan.flops


def test_zero_upstream_and_unused_loss():
    layout, pairs, _ = units_batch()
    got = linear_route(problem(SHAPE, V, H), layout, pairs, upstream=0.0)
    assert all(torch.count_nonzero(g) == 0 for g in got[1:])


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_backward_twice(needs, upstream):
    """retain_graph: the second backward adds the same gradient again."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    want = linear_route(p, layout, pairs, needs=needs, rows=5, **options)
    leaves = p.leaves(needs)
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=budget(5, F32), **options).loss
    (loss * upstream).backward(retain_graph=True)
    (loss * upstream).backward()
    for t, g in zip(leaves, want[1:], strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad, 2 * g * upstream, rtol=1e-5, atol=1e-9)


def test_gradients_zeroed_between_two_backwards():
    """optimizer.zero_grad(set_to_none=False) between them: right, or autograd's error about a changed tensor;
    never a wrong number."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    want = linear_route(p, layout, pairs, **options)
    leaves = p.leaves()
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss
    loss.backward(retain_graph=True)
    for t in leaves:
        t.grad.zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        for t, g in zip(leaves, want[1:], strict=True):
            torch.testing.assert_close(t.grad, g)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (0, 5)])
def test_scaling_what_was_kept(monkeypatch, dtype, shape):
    """The product in float32, rounded once, block by block; factors that the kept dtype cannot hold; rows of
    factor 0 are zeros."""
    monkeypatch.setattr(autograd, "_BLOCK_ELEMENTS", 10)
    g = torch.Generator().manual_seed(0)
    kept = torch.randn(shape, generator=g, dtype=F64).to(dtype) * 1e-3
    wide = torch.promote_types(dtype, F32)
    for scale in (torch.tensor(1 / 3), torch.tensor(1e5), torch.tensor(1.0), torch.rand(shape[0], 1, generator=g)):
        assert torch.equal(
            autograd.scale_kept(kept.clone(), scale.to(wide), "cpu"), (kept.to(wide) * scale.to(wide)).to(dtype)
        )
    if shape[0] > 2:
        scale, broken = torch.ones(shape[0], 1), kept.clone()
        scale[2], broken[2] = 0.0, float("nan")
        assert torch.count_nonzero(autograd.scale_kept(broken.clone(), scale.to(wide), "cpu")[2]) == 0


def test_gradient_of_one_step_is_not_touched_by_another():
    """A frozen head, NaN in a step whose sum gets no gradient."""
    layout = layout_of_lengths([3, 4], V)
    p = problem((1, layout.shape[1]), V, H)
    p.hidden[0, 4] = float("nan")
    for needs in ((1, 0, 0), (1, 1, 1)):
        leaves = p.leaves(needs)
        linear_step_logps(*leaves[:2], layout, bias=leaves[2]).sums[0].backward()
        assert torch.count_nonzero(leaves[0].grad[0, 3:7]) == 0 and leaves[0].grad[0, :3].abs().sum() > 0


def test_kept_gradient_handed_out_and_changed():
    """autograd.grad may hand out what is kept for a second backward: changing it is an error or harmless, never a
    wrong number."""
    layout, pairs, options = units_batch()
    hidden, weight, bias = problem(SHAPE, V, H).leaves()
    loss = linear_step_pref_loss(hidden, weight, layout, pairs, bias=bias, **options).loss
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    copy = first.clone()
    first.mul_(3)
    try:
        (second,) = torch.autograd.grad(loss, weight)
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        assert torch.equal(second, copy)


def test_gradients_accumulate_over_micro_batches():
    layout, pairs, options = units_batch()
    leaves = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64).leaves()
    single = linear_route(problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64), layout, pairs, **options)
    for _ in range(3):
        loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss
        (loss / 3).backward()
    for t, g in zip(leaves, single[1:], strict=True):
        torch.testing.assert_close(t.grad, g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_second_derivative_is_refused(needs):
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    for fn in (
        lambda h, w, b: linear_step_pref_loss(h, w, layout, pairs, bias=b, **options).loss,
        lambda h, w, b: linear_step_logps(h, w, layout, bias=b).sums.square().sum(),
    ):
        leaves = p.leaves(needs)
        wanted = [t for t in leaves if t.requires_grad]
        with pytest.raises(RuntimeError, match="sspo_ext.*reference"):
            gradients = torch.autograd.grad(fn(*leaves), wanted, create_graph=True)
            sum(g.square().sum() for g in gradients).backward()
    leaves = p.leaves(needs)
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], backend="reference", **options).loss
    gradients = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
