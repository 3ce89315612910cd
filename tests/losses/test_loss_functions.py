"""The losses of torch ops on step log-probs: golden values by hand, loops over tokens, gradients, both routes, limits.

Mutations of sspo_ext/{step,batch,token}_losses.py and step_functions.py, each caught by the test named (on a copy of the package):
  direct advantage without its 1/2          test_direct_advantage_by_hand
  OREO: gradient through later steps        test_oreo_by_hand
  OREO's critic without its own step        test_oreo_by_hand
  prefix sums for suffix sums               test_oreo_by_hand
  OREO: kl= not used, constant, or summed   test_oreo_with_the_papers_kl
  KTO: z0 added                             test_kto_by_hand
  KTO: z0 below 0                           test_kto_by_hand
  AOT: empty steps sorted among the others  test_aot_leaves_out_empty_steps
  lists of one counted in the mean          test_plackett_luce_by_hand
  TDPO2: gradient through the chosen KL     test_tdpo_by_hand
  WPO: token weights in the mean            test_wpo_by_hand
  Full-Step-DPO: kappa's sign               test_full_step_dpo_is_its_formula
  Full-Step-DPO: pairs held to step numbers test_full_step_dpo_counts_sequences
  TPO: a gold step -1 is the last           test_messages
  16-bit log-probs taken as they are        test_log_probs_stored_in_16_bits_are_their_float32_values
"""
# ruff: noqa: E501 (tables of calls and their messages)

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.batch import random_batch, random_pairs
from helpers.loss_calls import calls

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.common import LOSS_FUNCTIONS, StepGrid
from sspo_ext.losses.lists import level_pairs, listwise_loss, plackett_luce_loss, tpo_l_loss, tpo_loss, trpa_loss
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.losses.pref import pref_loss, step_pref_loss
from sspo_ext.losses.targets import direct_advantage_loss, implicit_prm_loss, oreo_loss, oreo_value_loss
from sspo_ext.losses.tokens import full_step_dpo_loss, tdpo1_loss, tdpo2_loss, wpo_weights
from sspo_ext.losses.transport import aot_loss, aot_unpaired_loss
from sspo_ext.losses.unpaired import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from sspo_ext.objective.sums import StepLogps, sums_over_steps

F64 = torch.float64


def t(*values):
    return torch.tensor(values, dtype=F64)


def made(*sequences, **more):
    """Log-probs and layout of sequences of steps, each step a list of token log-probs (an empty one is possible)."""
    B, T = len(sequences), 1 + max(sum(len(s) for s in seq) for seq in sequences)
    labels, ids = torch.full((B, T), -100), torch.full((B, T), -1)
    tokens = []
    for b, steps in enumerate(sequences):
        at = 1
        for k, step in enumerate(steps):
            labels[b, at : at + len(step)], ids[b, at : at + len(step)] = 0, k
            tokens += step
            at += len(step)
    layout = StepLayout.from_step_ids(labels, ids)
    tokens = t(*tokens).requires_grad_()
    return StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens, **more), layout


def softplus(x):
    return math.log1p(math.exp(x))


# ---- steps against targets


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


# ---- batches


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


def test_plackett_luce_by_hand():
    # rewards 2, 1, 0: -log(e^2 / (e^2 + e + 1)) - log(e / (e + 1))
    logps, layout = made([[-1.0]], [[-2.0]], [[-3.0]])
    ref = t(-3.0, -3.0, -3.0)
    want = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    out = plackett_luce_loss(logps, layout, torch.tensor([[0, 1, 2]]), ref=ref, beta=1.0)
    assert out.loss.item() == pytest.approx(want)
    # the other way round, and a list that is shorter; a list of one is no list
    lists = torch.tensor([[2, 1, 0], [0, 1, -1], [2, -1, -1]])
    out = plackett_luce_loss(logps, layout, lists, ref=ref, beta=1.0)
    turned = math.log(1 + math.exp(1) + math.exp(2)) + math.log(1 + math.exp(1))
    assert out.losses.tolist() == pytest.approx([turned, softplus(-1.0), 0.0])
    assert out.loss.item() == pytest.approx((turned + softplus(-1.0)) / 2)


def test_two_responses_are_dpo():
    logps, layout = made([[-1.0]], [[-2.0, -0.5]], [[-3.0]], [[-1.5]])
    ref, pairs = t(-2.0, -2.0, -2.0, -2.0), torch.tensor([[0, 2], [1, 3]])
    want = pref_loss(logps, layout, pairs, ref=ref, beta=0.7).loss
    assert plackett_luce_loss(logps, layout, pairs, ref=ref, beta=0.7).loss.item() == pytest.approx(want.item())
    # scores far apart: all the weight is on the first
    far = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert listwise_loss(logps, layout, pairs, far, ref=ref, beta=0.7).loss.item() == pytest.approx(want.item())


def test_listwise_by_hand():
    # rewards 1, 0 ; p = softmax(ln 3, 0) = 3/4, 1/4: 3/4 softplus(-1) + 1/4 softplus(1)
    logps, layout = made([[-1.0]], [[-2.0]], [[-2.0]])
    lists, scores = torch.tensor([[0, 1, -1]]), torch.tensor([[math.log(3), 0.0, 99.0]])
    out = listwise_loss(logps, layout, lists, scores, beta=1.0)
    assert out.loss.item() == pytest.approx(0.75 * softplus(-1.0) + 0.25 * softplus(1.0))
    cold = listwise_loss(logps, layout, lists, scores, beta=1.0, score_temperature=0.5)  # 9 : 1
    assert cold.loss.item() == pytest.approx(0.9 * softplus(-1.0) + 0.1 * softplus(1.0))


def test_tpo_by_hand():
    # S = -2, -6 with n = 2, 3, gold -8 with n = 2: z = .5 * 4 ; means -1, -2: z = 2 * 1 - .5
    logps, layout = made([[-1.0, -1.0]], [[-2.0, -2.0, -2.0]], [[-4.0, -4.0]])
    pairs, gold = torch.tensor([[0, 1]]), torch.tensor([2])
    out = tpo_loss(logps, layout, pairs, gold, beta=0.5, tpo_alpha=0.1)
    assert out.loss.item() == pytest.approx(softplus(-2.0) + 0.4) and out.metrics["nll"].item() == 4
    out = tpo_l_loss(logps, layout, pairs, gold, tpo_alpha=0.1, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * softplus(-1.5) + 0.1 * softplus(1.5) + 0.4)


def test_trpa_by_hand():
    # means of log-ratios 1, 0, -1; b = 2 * 2.5 from the top level, else 2
    logps, layout = made([[-1.0, -1.0]], [[-2.0]], [[-3.0]])
    ref = t(-4.0, -2.0, -2.0)
    index, top = level_pairs(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    assert index.tolist() == [[0, 1], [0, 2], [1, 2]] and top.tolist() == [True, True, False]
    out = trpa_loss(logps, layout, index, top, ref=ref, beta=2.0)
    assert out.losses.tolist() == pytest.approx([softplus(-5.0), softplus(-10.0), softplus(-2.0)])
    less = trpa_loss(logps, layout, index, top, ref=ref, beta=2.0, top_scale=0.25)
    assert less.losses.tolist() == pytest.approx([softplus(-0.5), softplus(-1.0), softplus(-2.0)])
    assert level_pairs(torch.tensor([1, 2, 0, 1]), torch.tensor([0, 1, 0, 1]))[0].tolist() == [[3, 1]]


# ---- tokens


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


# ---- all of them: gradients, routes, empty batches, extremes


STOP_GRADIENT = {"oreo", "oreo_value", "tdpo2", "full_step_dpo"}  # whose gradient is not their value's


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_gradcheck(name):
    if name in STOP_GRADIENT:
        pytest.skip("has constants that depend on the log-probs; its gradient is tested by hand")
    batch = random_batch(3, weighted=True)
    layout = batch.layout
    g = torch.Generator().manual_seed(0)
    tokens = -torch.rand(layout.num_rows, generator=g, dtype=F64) * 3
    kl = torch.rand(layout.num_rows, generator=g, dtype=F64)
    call = calls(layout, g)[name]

    def loss(tokens, kl):
        return call(StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens, kl=kl)).loss

    inputs = (tokens.requires_grad_(), kl.requires_grad_(name == "tdpo1"))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_routes_agree(name):
    """Logits and linear route, fused, against plain torch in float64."""
    batch = random_batch(5, V=13, dtype=F64)
    layout = batch.layout
    g = torch.Generator().manual_seed(1)
    hidden, weight, old = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((4, 12, 6), (13, 6), (4, 12, 13)))
    call = calls(layout, g)[name]
    needs_kl = name in ("oreo", "tdpo1", "tdpo2")
    results = []
    for route in ("reference", "logits", "linear"):
        dtype = F64 if route == "reference" else torch.float32
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        head = weight.to(dtype)
        if route == "linear":
            more = {"kl_ref_hidden": hidden.to(dtype) * 0.5} if needs_kl else {}
            logps = linear_step_logps(leaf, head, layout, **more)
        else:
            more = {"kl_ref_logits": (hidden * 0.5 @ weight.t()).to(dtype)} if needs_kl else {}
            more["backend"] = "reference" if route == "reference" else "auto"
            logps = step_logps(leaf @ head.t(), layout, **more)
        out = call(logps)
        out.loss.backward()
        results.append((out, leaf.grad.double()))
    want, gradient = results[0]
    assert gradient.abs().max() > 0
    for out, grad in results[1:]:
        torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_nothing_to_score(name):
    labels = torch.full((2, 6), -100)
    ids = torch.tensor([[-1, 0, 1, 2, 2, 3]]).repeat(2, 1)
    layout = StepLayout.from_step_ids(labels, ids)
    tokens = torch.zeros(0, dtype=F64, requires_grad=True)
    logps = StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens, kl=torch.zeros(0, dtype=F64))
    out = calls(layout, torch.Generator().manual_seed(0))[name](logps)
    out.loss.backward()
    assert out.loss.item() == 0 and not out.losses.any() and tokens.grad.shape == (0,)


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_finite_far_out(name, dtype):
    """Log-probs of -1e5 beside -1e-9, one-token and empty steps: loss and gradient are finite."""
    layout = made([[1.0], [], [1.0, 1.0], [1.0]], [[1.0, 1.0], [1.0], [1.0]])[1]
    for tokens in (
        torch.tensor([-1e5, -1e-9, -1e5, -3.0, -1e-9, 0.0, -1e5, -50.0], dtype=dtype),
        torch.tensor([0.0, -1e5, 0.0, -1e5, -1e5, -1e5, 0.0, 0.0], dtype=dtype),
    ):
        tokens.requires_grad_()
        logps = StepLogps(sums_over_steps(tokens, layout), layout.counts, tokens, kl=torch.full_like(tokens, 1e4))
        out = calls(layout, torch.Generator().manual_seed(0))[name](logps)
        (grad,) = torch.autograd.grad(out.loss, tokens)
        assert out.loss.isfinite() and grad.isfinite().all() and out.losses.isfinite().all()


STORED = {
    **{name: None for name in LOSS_FUNCTIONS},
    "pref_loss": lambda x, layout: pref_loss(x, layout, loss_type=["simpo", "sft"]),
    "pref_loss with ref": lambda x, layout: pref_loss(x, layout, ref=x, loss_type="ipo"),
    "wpo_weights": lambda x, layout: wpo_weights(x, layout, random_pairs(layout, 0, 6)),
    "kto_reference_point": lambda x, layout: kto_reference_point(x, layout, x.tokens * 0.5),
    "step_pref_loss": lambda x, layout: step_pref_loss(random_batch(3).logits, layout, ref=x),
    "step_policy_loss": lambda x, layout: step_policy_loss(
        random_batch(3).logits, layout, x.sums, old=x, ref=x, kl_coef=0.1, loss_type="ppo"
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_log_probs_stored_in_16_bits_are_their_float32_values(name, dtype):
    """A cache of a reference's log-probs; no sum is made in 16 bits, and gradients arrive in them."""
    layout, g = random_batch(3, weighted=True).layout, torch.Generator().manual_seed(0)
    tokens = -torch.rand(layout.num_rows, generator=g) * 3
    parts = {
        "sums": sums_over_steps(tokens, layout), "tokens": tokens, "entropy": tokens.abs(), "sum_p2": tokens.exp(),
        "kl": tokens.square(),
    }  # fmt: skip
    call = STORED[name] or (lambda x, layout: calls(layout, torch.Generator().manual_seed(0))[name](x))
    results = []
    for wide in (torch.float32, dtype):
        leaves = {k: v.to(dtype).to(wide).requires_grad_() for k, v in parts.items()}
        out = call(StepLogps(counts=layout.counts, **leaves), layout)
        out = getattr(out, "loss", out)
        grads = torch.autograd.grad(out, list(leaves.values()), allow_unused=True) if out.grad_fn else ()
        results.append([out.detach(), *(g.to(dtype) for g in grads if g is not None)])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_steps_of_16_bit_values(dtype):
    layout = random_batch(3, weighted=True).layout
    values = torch.rand(layout.num_rows, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(sums_over_steps(values, layout), sums_over_steps(values.float(), layout))


def test_every_function_is_tested():
    layout = random_batch(0).layout
    assert set(calls(layout, torch.Generator())) == set(LOSS_FUNCTIONS)


def test_normalisers():
    logps, layout = made([[], [-1.0]], [[-2.0]])
    args = (logps, layout, t(0.0, 0.0, 0.0))
    mean = direct_advantage_loss(*args)
    assert mean.loss.item() == pytest.approx(1.25)  # (.5 + 2) / 2 steps with tokens
    assert direct_advantage_loss(*args, reduction="sum").loss.item() == pytest.approx(2.5)
    for items in (5, torch.tensor(5)):
        assert direct_advantage_loss(*args, num_items=items).loss.item() == pytest.approx(0.5)
    for items in (0, torch.tensor(0)):
        assert direct_advantage_loss(*args, num_items=items).loss.item() == 0


def test_grid():
    layout = random_batch(7).layout
    grid, values = StepGrid(layout), torch.randn(layout.num_steps, dtype=F64)
    sequence = layout.step_sequence.tolist()
    assert torch.equal(grid.gather(grid.spread(values)), values)
    for b in range(layout.num_sequences):
        mine = [v.item() for v, s in zip(values, sequence, strict=True) if s == b]
        assert grid.sequence_sums(values)[b].item() == pytest.approx(sum(mine))
        suffix = [v.item() for v, s in zip(grid.suffix_sums(values), sequence, strict=True) if s == b]
        assert suffix == pytest.approx([sum(mine[k:]) for k in range(len(mine))])


def test_pref_loss_equals_step_pref_loss(backend):
    batch = random_batch(1, weighted=True)
    layout = batch.layout
    logps = step_logps(batch.logits, layout, backend=backend)
    for options in ({}, {"loss_type": "simpo"}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}):
        want = step_pref_loss(batch.logits, layout, backend=backend, **options)
        got = pref_loss(logps, layout, **options)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.pair_losses, want.pair_losses)
        assert got.metrics.keys() == want.metrics.keys()


def full_step(logps, layout, pairs):
    return full_step_dpo_loss(logps, layout, torch.tensor(pairs), t(0, 0, 0), ref=t(0, 0, 0))


BAD = {
    "logps": (lambda x, la: kto_loss(x.sums, la, None), TypeError, "logps: expected a StepLogps"),
    "layout": (lambda x, la: direct_advantage_loss(x, random_batch(0).layout, None), ValueError, r"logps\.sums: expected shape"),
    "reference": (lambda x, la: kto_loss(x, la, None), ValueError, "ref: KTO needs a reference"),
    "desirable": (lambda x, la: kto_loss(x, la, t(1, 1, 1), ref=t(0, 0, 0)), TypeError, "desirable: expected a bool tensor"),
    "advantages": (lambda x, la: direct_advantage_loss(x, la, t(1, 1)), ValueError, r"advantages: expected shape \(3,\)"),
    "outcomes": (lambda x, la: implicit_prm_loss(x, la, t(1, 1, 1), ref=t(0, 0, 0)), ValueError, r"outcomes: expected shape \(2,\)"),
    "beta": (lambda x, la: implicit_prm_loss(x, la, t(1, 1), ref=t(0, 0, 0), beta=0.0), ValueError, "beta: expected"),
    "lists": (lambda x, la: plackett_luce_loss(x, la, torch.tensor([0, 1])), ValueError, r"lists: expected \(G, n\)"),
    "list out of range": (lambda x, la: plackett_luce_loss(x, la, torch.tensor([[0, 3]])), ValueError, "lists: expected step numbers below 3, got 3"),
    "scores": (lambda x, la: listwise_loss(x, la, torch.tensor([[0, 1]]), t(1, 2)), ValueError, r"scores: expected shape \(1, 2\)"),
    "list out of the layout": (lambda x, la: listwise_loss(x, la, torch.tensor([[0, 7]]), t(1, 2)), ValueError, "lists: expected step numbers below 3, got 7"),
    "gold out of range": (lambda x, la: tpo_loss(x, la, torch.tensor([[0, 1]]), torch.tensor([3])), ValueError, r"gold: expected step numbers in \[0, 3\), got 3"),
    "gold that is no step": (lambda x, la: tpo_l_loss(x, la, torch.tensor([[0, 1]]), torch.tensor([1, -1])), ValueError, r"gold: expected step numbers in \[0, 3\), got -1"),
    "solutions": (lambda x, la: full_step(x, la, [[2, 0]]), ValueError, r"pairs: expected sequence numbers in \[0, 2\), got 2"),
    "no solution": (lambda x, la: full_step(x, la, [[-1, 0]]), ValueError, r"pairs: expected sequence numbers in \[0, 2\), got -1"),
    "solutions in one row": (lambda x, la: full_step(x, la, [0, 1]), ValueError, "pairs: expected 2 dimensions"),
    "three solutions": (lambda x, la: full_step(x, la, [[0, 1, 0]]), ValueError, r"pairs: expected shape \(1, 2\)"),
    "num_items": (lambda x, la: direct_advantage_loss(x, la, t(1, 1, 1), num_items=-4), ValueError, "num_items: expected a finite number, 0 or above, got -4"),
    "num_items as a tensor": (lambda x, la: direct_advantage_loss(x, la, t(1, 1, 1), num_items=torch.tensor(-4)), ValueError, "num_items: expected a finite number, 0 or above, got -4"),
    "num_items that is no number": (lambda x, la: direct_advantage_loss(x, la, t(1, 1, 1), num_items=torch.tensor(math.nan)), ValueError, "num_items: expected a finite number, 0 or above, got nan"),
    "gold": (lambda x, la: tpo_loss(x, la, torch.tensor([[0, 1]]), t(1.0)), TypeError, "gold: expected an integer tensor"),
    "top": (lambda x, la: trpa_loss(x, la, torch.tensor([[0, 1]]), torch.ones(2).bool(), ref=t(0, 0, 0)), ValueError, r"top: expected shape \(1,\)"),
    "reduction": (lambda x, la: direct_advantage_loss(x, la, t(1, 1, 1), reduction="none"), ValueError, "reduction: expected one of"),
    "smoothing": (lambda x, la: aot_loss(x, la, torch.tensor([[0, 1]]), ref=t(0, 0, 0), label_smoothing=0.5), ValueError, "label_smoothing: expected"),
}  # fmt: skip


def test_full_step_dpo_counts_sequences():
    """Six sequences of which two have a step: each number below six is a solution's, the empty ones just do not count."""
    logps, layout = made([], [[-1.0]], [], [[-2.0]], [], [])
    args = {"step_rewards": t(0, 0), "ref": t(0, 0)}
    both = full_step_dpo_loss(logps, layout, torch.tensor([[1, 3], [5, 4]]), **args)
    assert both.losses[0] != 0 and both.losses[1] == 0
    assert both.loss == full_step_dpo_loss(logps, layout, torch.tensor([[1, 3]]), **args).loss


@pytest.mark.parametrize("case", BAD)
def test_messages(case):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call(*made([[-1.0], [-2.0]], [[-3.0]]))


def test_reference_point_is_not_differentiated():
    logps, layout = made([[-1.0]], [[-2.0]])
    z0 = logps.sums.mean()
    out = kto_loss(logps, layout, torch.tensor([True, True]), ref=t(0.0, 0.0), reference_point=z0)
    (grad,) = torch.autograd.grad(out.loss, logps.tokens)
    fixed = kto_loss(logps, layout, torch.tensor([True, True]), ref=t(0.0, 0.0), reference_point=z0.item())
    assert torch.equal(grad, torch.autograd.grad(fixed.loss, logps.tokens)[0])
    assert F.mse_loss(out.losses, fixed.losses).item() == 0
