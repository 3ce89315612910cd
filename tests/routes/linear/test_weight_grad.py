# SPDX-License-Identifier: Apache-2.0
"""The weight's gradient on the linear route: the caller's buffer, and the dtype it is accumulated in.

Mutation of sspo_ext/routes/linear, and the test that catches it:
* buffer filled in forward, overwritten, or its gradient given to autograd too: test_weight_grad_buffer
"""

import pytest
import torch
from helpers.linear import (
    errors,
    layout_of_lengths,
    pairs_of,
    problem,
    truth_of,
)
from helpers.linear_route import BF16, F16, F32, F64, SHAPE, H, V, budget, linear_route, units_batch

from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss


@pytest.mark.parametrize("buffer_dtype, weight_dtype", [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64), (F32, F16)])
@pytest.mark.parametrize("rows", [10_000, 4])
def test_weight_grad_buffer(buffer_dtype, weight_dtype, rows):
    """Added to, in backward only, once per backward, times the upstream gradient; autograd sees no gradient of the
    weight."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=weight_dtype, weight_dtype=weight_dtype)
    plain = linear_route(p, layout, pairs, rows=rows, **options)
    start = torch.randn(V, H, generator=torch.Generator().manual_seed(9)).to(buffer_dtype)
    buffer = start.clone()
    hidden, weight, bias = p.leaves()
    loss = linear_step_pref_loss(
        hidden, weight, layout, pairs, bias=bias, weight_grad=buffer, chunk_bytes=budget(rows, p.dtype), **options
    ).loss
    assert torch.equal(buffer, start), "written before backward"
    (loss * 0.5).backward(retain_graph=True)
    once = buffer.clone()
    (loss * 0.5).backward()
    assert weight.grad is None
    rel = 4 * torch.finfo(min(buffer_dtype, weight_dtype, key=lambda d: d.itemsize)).eps
    size = max(1.0, plain[2].abs().max().item(), start.abs().max().item())
    assert (once.double() - start.double() - 0.5 * plain[2].double()).abs().max() <= rel * size
    assert (buffer.double() - start.double() - plain[2].double()).abs().max() <= 2 * rel * size
    torch.testing.assert_close(hidden.grad, plain[1])
    torch.testing.assert_close(bias.grad, plain[3])


def test_weight_grad_that_cannot_be_filled():
    layout, pairs, _ = units_batch()
    p = problem(SHAPE, V, H, bias=False)
    for buffer in (torch.zeros(V, H + 1), torch.zeros(V, H, dtype=torch.int64), torch.zeros(V, H, device="meta")):
        with pytest.raises((ValueError, TypeError), match="weight_grad"):
            linear_step_pref_loss(p.hidden, p.leaves()[1], layout, pairs, weight_grad=buffer)
    with pytest.raises(
        ValueError, match="weight_grad"
    ):  # a frozen weight: the buffer would stay as it is, without a word
        linear_step_pref_loss(p.leaves()[0], p.weight, layout, pairs, weight_grad=torch.zeros(V, H))


def test_accumulates_in_float32():
    """256 one-row chunks of bfloat16: accumulated in the weight's dtype the error grows with every addition."""
    layout = layout_of_lengths([128, 128], V)
    pairs = pairs_of(layout, (0, 1))
    p = problem((1, 257), V, H, bias=False, hidden_dtype=BF16, weight_dtype=BF16)
    p.hidden = p.hidden.abs()  # one sign, so that sums grow
    truth = truth_of(p, layout, pairs)[2]
    error = {
        dtype: errors(linear_route(p, layout, pairs, rows=1, accum_dtype=dtype)[2], truth)[1]
        for dtype in (None, F32, BF16)
    }
    assert error[None] == error[F32] < 0.5 * error[BF16]
    assert error[F32] <= 2 * torch.finfo(BF16).eps * truth.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e5m2, torch.complex64])
def test_accum_dtype_that_is_none(dtype):
    layout, pairs, _ = units_batch()
    p = problem(SHAPE, V, H)
    with pytest.raises((ValueError, TypeError), match="accum_dtype"):
        linear_step_pref_loss(*p.leaves()[:2], layout, pairs, accum_dtype=dtype)


def test_weight_grad_buffer_of_step_logps():
    layout, _, _ = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    plain = p.leaves()
    linear_step_logps(*plain[:2], layout, bias=plain[2], chunk_bytes=budget(5, F64)).sums.sum().backward()
    leaves, buffer = p.leaves(), torch.ones(V, H, dtype=F64)
    sums = linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=budget(5, F64), weight_grad=buffer).sums
    assert (buffer == 1).all()
    sums.sum().backward()
    assert leaves[1].grad is None
    torch.testing.assert_close(buffer - 1, plain[1].grad)
