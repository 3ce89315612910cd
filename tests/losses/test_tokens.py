# SPDX-License-Identifier: Apache-2.0
"""TDPO, WPO and Full-Step-DPO: golden values by hand, and a loop over tokens.

Mutations of sspo_ext/losses/tokens.py, each caught by the test named (on a copy of the package):
  TDPO2: gradient through the chosen KL     test_tdpo_by_hand
  WPO: token weights in the mean            test_wpo_by_hand
  Full-Step-DPO: kappa's sign               test_full_step_dpo_is_its_formula
  Full-Step-DPO: pairs held to step numbers test_full_step_dpo_counts_sequences
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math
from dataclasses import replace

import pytest
import torch
from helpers.step_logps import made, softplus, t

from sspo_ext.losses.pref import pref_loss
from sspo_ext.losses.tokens import full_step_dpo_loss, tdpo1_loss, tdpo2_loss, wpo_weights
from sspo_ext.objective.sums import StepLogps


def test_tdpo_by_hand():
    # u = 1, -1 ; K = .3 + .4, .2: tdpo1: .5 (2 + .5) ; tdpo2: .5 (2 + .5 * .5)
    kl = t(0.3, 0.4, 0.2).requires_grad_()
    logps, layout = made([[-1.0, -1.0]], [[-3.0]], kl=kl)
    pairs, ref = torch.tensor([[0, 1]]), t(-3.0, -2.0)
    one = tdpo1_loss(logps, layout, pairs, ref=ref, beta=0.5)
    assert one.loss.item() == pytest.approx(softplus(-1.25))
    assert [one.metrics[f"kl/{side}"].item() for side in ("chosen", "rejected")] == pytest.approx([0.7, 0.2])
    two = tdpo2_loss(logps, layout, pairs, ref=ref, beta=0.5)
    assert two.loss.item() == pytest.approx(softplus(-1.125))
    sig = 1 / (1 + math.exp(1.25))
    assert torch.autograd.grad(one.loss, kl, retain_graph=True)[0].tolist() == pytest.approx(
        [-0.5 * sig] * 2 + [0.5 * sig]
    )
    sig = 1 / (1 + math.exp(1.125))
    assert torch.autograd.grad(two.loss, kl, retain_graph=True)[0].tolist() == pytest.approx([0, 0, 0.25 * sig])
    # alpha 2: .5 (2 + 2 * .5); alpha 0: DPO
    more = tdpo2_loss(logps, layout, pairs, ref=ref, beta=0.5, tdpo_alpha=2.0)
    assert more.loss.item() == pytest.approx(softplus(-1.5))
    sig = 1 / (1 + math.exp(1.5))
    assert torch.autograd.grad(more.loss, kl, retain_graph=True)[0].tolist() == pytest.approx([0, 0, sig])
    assert tdpo2_loss(logps, layout, pairs, ref=ref, beta=0.5, tdpo_alpha=0.0).loss.item() == pytest.approx(
        softplus(-1.0)
    )
    with pytest.raises(ValueError, match=r"logps: expected \.kl"):
        tdpo1_loss(replace(logps, kl=None), layout, pairs, ref=ref)


def test_wpo_by_hand():
    # w_0 = exp mean(ln .5 - ln .5, ln .25 - ln .5) = sqrt(1/2) ; w_1 = .2 / .4
    p2 = t(0.5, 0.5, 0.4)
    logps, layout = made([[math.log(0.5), math.log(0.25)]], [[math.log(0.2)]], sum_p2=p2)
    pairs = torch.tensor([[0, 1]])
    weights = wpo_weights(logps, layout, pairs)
    assert weights.tolist() == pytest.approx([math.sqrt(0.5) / 2]) and not weights.requires_grad
    plain = pref_loss(logps, layout, pairs, loss_type="hinge").loss
    assert pref_loss(logps, layout, pairs, loss_type="hinge", weights=weights).loss.item() == pytest.approx(
        plain.item() * math.sqrt(0.5) / 2
    )
    heavy = layout.with_row_weights(torch.tensor([3.0, 0.5, 2.0]))
    assert wpo_weights(logps, heavy, pairs).tolist() == pytest.approx(weights.tolist())
    with pytest.raises(ValueError, match=r"logps: expected \.sum_p2"):
        wpo_weights(replace(logps, sum_p2=None), layout, pairs)


def test_full_step_dpo_is_its_formula():
    """One token at a time, as printed; and its gradient, with every factor but log pi a constant."""
    logps, layout = made([[-1.0, -0.5], [], [-2.0]], [[-0.7], [-1.1, -0.2]])
    ref = StepLogps(torch.zeros(5), layout.counts, t(-0.9, -0.8, -1.5, -1.2, -1.0, -0.3))
    rewards, beta, tau, kappa = t(0.5, 9.0, -0.3, 0.2, 0.1), 0.3, 0.7, 0.4
    sequences = {0: ([0, 1, 2], [0.5, 0.5, -0.3]), 1: ([3, 4, 5], [0.2, 0.1, 0.1])}
    tokens = logps.tokens.detach()

    def side(b, sign):
        rows, reward = sequences[b]
        exponents = [math.exp(sign * tau * r) for r in reward]
        factors = {}
        for n, e in zip(rows, exponents, strict=True):
            share = 3 * e / sum(exponents)
            p = 1 / (1 + math.exp(sign * kappa * (tokens[n] - ref.tokens[n]).item()))
            factors[n] = share * p / 3
        return factors

    u = [(tokens - ref.tokens)[rows].sum().item() for rows, _ in sequences.values()]
    outer = 1 / (1 + math.exp(-beta * (u[1] - u[0])))
    plus, minus = side(0, 1), side(1, -1)
    want = -outer * (
        sum(f * tokens[n].item() for n, f in plus.items()) - sum(f * tokens[n].item() for n, f in minus.items())
    )
    out = full_step_dpo_loss(logps, layout, torch.tensor([[0, 1]]), rewards, ref=ref, beta=beta, tau=tau, kappa=kappa)
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    out.loss.backward()
    gradient = [-outer * plus[n] if n < 3 else outer * minus[n] for n in range(6)]
    assert logps.tokens.grad.tolist() == pytest.approx(gradient, rel=1e-12)
    with pytest.raises(ValueError, match="ref: Full-Step-DPO needs token log-probs"):
        full_step_dpo_loss(logps, layout, torch.tensor([[0, 1]]), rewards, ref=t(0, 0, 0, 0, 0))


def test_full_step_dpo_counts_sequences():
    """Six sequences of which two have a step: each number below six is a solution's, the empty ones just do not count."""
    logps, layout = made([], [[-1.0]], [], [[-2.0]], [], [])
    args = {"step_rewards": t(0, 0), "ref": t(0, 0)}
    both = full_step_dpo_loss(logps, layout, torch.tensor([[1, 3], [5, 4]]), **args)
    assert both.losses[0] != 0 and both.losses[1] == 0
    assert both.loss == full_step_dpo_loss(logps, layout, torch.tensor([[1, 3]]), **args).loss
