# SPDX-License-Identifier: Apache-2.0
"""Losses of steps against targets: golden values by hand.

Mutations of sspo_ext/losses/targets.py, each caught by the test named (on a copy of the package):
  direct advantage without its 1/2          test_direct_advantage_by_hand
  OREO: gradient through later steps        test_oreo_by_hand
  OREO's critic without its own step        test_oreo_by_hand
  prefix sums for suffix sums               test_oreo_by_hand
  OREO: kl= not used, constant, or summed   test_oreo_with_the_papers_kl
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math
from dataclasses import replace

import pytest
import torch
from helpers.step_logps import F64, made, softplus, t

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.targets import direct_advantage_loss, implicit_prm_loss, oreo_loss, oreo_value_loss


def test_direct_advantage_by_hand():
    # u = -1, -3 + 2 = -1; targets .3/.1 = 3, -.2/.1 = -2: (16 + 1) / 2 / 2
    logps, layout = made([[-1.0], [-1.0, -2.0]])
    out = direct_advantage_loss(logps, layout, t(0.3, -0.2), ref=t(0.0, -2.0))
    assert out.loss.item() == pytest.approx(4.25)
    assert out.losses.tolist() == pytest.approx([8.0, 0.5]) and out.rewards.tolist() == pytest.approx([-0.1, -0.1])
    out.loss.backward()
    # d/du = (u - target) / 2 steps
    assert logps.tokens.grad.tolist() == pytest.approx([-2.0, 0.5, 0.5])
    weighted = direct_advantage_loss(logps, layout, t(0.3, -0.2), ref=t(0.0, -2.0), weights=t(0.0, 3.0))
    assert weighted.loss.item() == pytest.approx(0.75)


def test_oreo_by_hand():
    # u = -1, -2, -4 (one sequence), R = 1, V = .5, .6, .7, beta .1
    logps, layout = made([[-1.0], [-2.0], [-4.0]])
    values, rewards, ref = t(0.5, 0.6, 0.7), t(1.0), torch.zeros(3, dtype=F64)
    out = oreo_loss(logps, layout, values, rewards, ref=ref, beta=0.1)
    residual = [0.5 - 1 - 0.7, 0.6 - 1 - 0.6, 0.7 - 1 - 0.4]
    assert out.loss.item() == pytest.approx(sum(r * r for r in residual) / 3)
    out.loss.backward()
    # a step's own u alone carries gradient: 2 beta residual / 3
    assert logps.tokens.grad.tolist() == pytest.approx([2 * 0.1 * r / 3 for r in residual])
    critic = values.clone().requires_grad_()
    logps.tokens.grad = None
    value = oreo_value_loss(logps, layout, critic, rewards, ref=ref, beta=0.1)
    assert value.loss.item() == pytest.approx(out.loss.item())
    value.loss.backward()
    assert critic.grad.tolist() == pytest.approx([2 * r / 3 for r in residual]) and logps.tokens.grad is None


def test_oreo_with_exact_kl():
    logps, layout = made([[-1.0], [-2.0, -3.0]], kl=t(0.3, 0.6, 0.9))
    args = (t(0.0, 0.0), t(0.0))
    plain = oreo_loss(logps, layout, *args, ref=t(0.0, 0.0)).loss
    assert oreo_loss(logps, layout, *args, ref=t(0.0, 0.0), kl_coef=0.5).loss.item() == pytest.approx(
        plain.item() + 0.3
    )
    with pytest.raises(ValueError, match=r"logps: expected \.kl beside kl_coef"):
        oreo_loss(replace(logps, kl=None), layout, *args, ref=t(0.0, 0.0), kl_coef=0.5)


def test_oreo_with_the_papers_kl():
    """pi = (3/4, 1/4), ref = (1/2, 1/2): KL(pi || ref) = 3/4 ln 3/2 + 1/4 ln 1/2; the fused one is KL(ref || pi)."""
    layout = StepLayout.from_step_ids(torch.zeros(1, 3).long(), torch.tensor([[-1, 0, 1]]))
    logits, ref_logits = t(3.0, 1.0).log().repeat(1, 3, 1).requires_grad_(), torch.zeros(1, 3, 2, dtype=F64)
    logps = step_logps(logits, layout, kl_ref_logits=ref_logits)
    args = (logps, layout, t(0.0, 0.0), t(0.0))
    p, q = (x.flatten(0, 1)[layout.rows.long()].log_softmax(-1) for x in (logits, ref_logits))
    kl = (p.exp() * (p - q)).sum(-1)
    plain, fused, paper = (oreo_loss(*args, ref=t(0.0, 0.0), **more) for more in (
        {}, {"kl_coef": 0.5}, {"kl_coef": 0.5, "kl": kl}
    ))  # fmt: skip
    assert (fused.loss - plain.loss).item() == pytest.approx(0.5 * math.log(2 / math.sqrt(3)))
    assert (paper.loss - plain.loss).item() == pytest.approx(0.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert paper.metrics["kl"].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    (gradient,) = torch.autograd.grad(paper.loss - plain.loss, logits)
    # d KL / d z_1 = p_1 p_2 ln 3, a mean over two tokens, times .5; nothing after the last row
    row = 0.5 / 2 * 3 / 16 * math.log(3)
    assert gradient.flatten().tolist() == pytest.approx([row, -row] * 2 + [0.0, 0.0])
    with pytest.raises(ValueError, match=r"kl: expected shape \(2,\)"):
        oreo_loss(*args, ref=t(0.0, 0.0), kl_coef=0.5, kl=kl[None])


def test_implicit_prm_by_hand():
    # U = -3 and -4 + 6 = 2, beta .5: -1.5, 1 ; outcomes 1, 0: softplus(1.5), softplus(1)
    logps, layout = made([[-1.0], [-2.0]], [[-4.0]])
    out = implicit_prm_loss(logps, layout, t(1.0, 0.0), ref=t(0.0, 0.0, -6.0), beta=0.5)
    assert out.losses.tolist() == pytest.approx([softplus(1.5), softplus(1.0)])
    assert out.rewards.tolist() == pytest.approx([-0.5, -1.0, 1.0])
    assert out.metrics["accuracy"].item() == 0
    soft = implicit_prm_loss(logps, layout, t(0.25, 0.0), ref=t(0.0, 0.0, -6.0), beta=0.5)
    assert soft.losses[0].item() == pytest.approx(0.25 * softplus(1.5) + 0.75 * softplus(-1.5))
