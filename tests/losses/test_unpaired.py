# SPDX-License-Identifier: Apache-2.0
"""KTO, APO-zero and AOT: golden values by hand.

Mutations of sspo_ext/losses/{unpaired,transport}.py, each caught by the test named (on a copy of the package):
  KTO: z0 added                             test_kto_by_hand
  KTO: z0 below 0                           test_kto_by_hand
  AOT: empty steps sorted among the others  test_aot_leaves_out_empty_steps
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.step_logps import made, softplus, t

from sspo_ext.losses.transport import aot_loss, aot_unpaired_loss
from sspo_ext.losses.unpaired import apo_zero_unpaired_loss, kto_loss, kto_reference_point


def test_kto_by_hand():
    # u = 2, -1 ; z0 = .5 ; beta 1: 1 - sig(1.5) = sig(-1.5); 1 - sig(.5 + 1) = sig(-1.5)
    logps, layout = made([[-1.0]], [[-4.0]])
    ref, up = t(-3.0, -3.0), torch.tensor([True, False])
    sig = 1 / (1 + math.exp(1.5))
    out = kto_loss(logps, layout, up, ref=ref, reference_point=t(0.5)[0], beta=1.0)
    assert out.losses.tolist() == pytest.approx([sig, sig])
    assert out.metrics["rewards/chosen"].item() == 2 and out.metrics["rewards/rejected"].item() == -1
    weighted = kto_loss(
        logps, layout, up, ref=ref, reference_point=0.5, beta=1.0, desirable_weight=2.0, undesirable_weight=0.5
    )
    assert weighted.loss.item() == pytest.approx((2 * sig + 0.5 * sig) / 2)
    # z0 = 0: 1 - sig(2), sig(-1)
    apo = apo_zero_unpaired_loss(logps, layout, up, ref=ref, beta=1.0)
    assert apo.losses.tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(1))])
    # mean of 2 and -1, and of -1 and -2 (held at 0)
    assert kto_reference_point(logps, layout, ref).item() == pytest.approx(0.5)
    assert kto_reference_point(logps, layout, t(0.0, -2.0)).item() == 0
    assert not kto_reference_point(logps, layout, ref).requires_grad


def test_aot_by_hand():
    # margins 3, 1 sorted 1, 3; the reference's -1, 2: z = 2, 1 (not the 4, -1 of the pairs as they are)
    logps, layout = made([[-1.0]], [[-2.0]], [[-4.0]], [[-3.0]])
    pairs, ref = torch.tensor([[0, 2], [1, 3]]), t(-1.0, -1.0, 0.0, -3.0)
    out = aot_loss(logps, layout, pairs, ref=ref, beta=1.0)
    assert out.losses.tolist() == pytest.approx([softplus(-2.0), softplus(-1.0)])
    smooth = aot_loss(logps, layout, pairs, ref=ref, beta=1.0, label_smoothing=0.2)
    assert smooth.losses[0].item() == pytest.approx(0.8 * softplus(-2.0) + 0.2 * softplus(2.0))
    # u_w = 0, -1 sorted -1, 0; u_l = -4, 0: z = 3, 0
    out = aot_unpaired_loss(logps, layout, pairs, ref=ref, beta=1.0)
    assert out.losses.tolist() == pytest.approx([softplus(-3.0), softplus(0.0)])
    out.loss.backward()
    assert logps.tokens.grad.abs().tolist() == pytest.approx(
        [0.25, 0.5 / (1 + math.exp(3)), 0.5 / (1 + math.exp(3)), 0.25]
    )


def test_aot_leaves_out_empty_steps():
    full, full_layout = made([[-1.0]], [[-2.0]], [[-4.0]], [[-3.0]])
    pairs, ref = torch.tensor([[0, 2], [1, 3]]), t(-1.0, -1.0, 0.0, -3.0)
    want = aot_loss(full, full_layout, pairs, ref=ref)
    logps, layout = made([[-1.0], [], [-9.0]], [[-2.0]], [[-4.0]], [[-3.0]])
    more = torch.tensor([[0, 4], [1, 5], [3, 5]])
    for fn, other in ((aot_loss, want), (aot_unpaired_loss, aot_unpaired_loss(full, full_layout, pairs, ref=ref))):
        got = fn(logps, layout, more, ref=t(-1.0, 0.0, 0.0, -1.0, 0.0, -3.0))
        assert got.loss.item() == pytest.approx(other.loss.item())
        (grad,) = torch.autograd.grad(got.loss, logps.tokens)
        assert grad.isfinite().all() and grad[1] == 0


def test_reference_point_is_not_differentiated():
    logps, layout = made([[-1.0]], [[-2.0]])
    z0 = logps.sums.mean()
    out = kto_loss(logps, layout, torch.tensor([True, True]), ref=t(0.0, 0.0), reference_point=z0)
    (grad,) = torch.autograd.grad(out.loss, logps.tokens)
    fixed = kto_loss(logps, layout, torch.tensor([True, True]), ref=t(0.0, 0.0), reference_point=z0.item())
    assert torch.equal(grad, torch.autograd.grad(fixed.loss, logps.tokens)[0])
    assert F.mse_loss(out.losses, fixed.losses).item() == 0
