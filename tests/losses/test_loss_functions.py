# SPDX-License-Identifier: Apache-2.0
"""All losses of torch ops on step log-probs: gradients, both routes, nothing to score, limits, messages.

Mutations, each caught by the test named (on a copy of the package):
  TPO: a gold step -1 is the last           test_messages
  16-bit log-probs taken as they are        test_log_probs_stored_in_16_bits_are_their_float32_values
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.loss_calls import calls
from helpers.step_logps import F64, made, t

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.common import LOSS_FUNCTIONS, StepGrid
from sspo_ext.losses.lists import listwise_loss, plackett_luce_loss, tpo_l_loss, tpo_loss, trpa_loss
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.losses.pref import pref_loss, step_pref_loss
from sspo_ext.losses.targets import direct_advantage_loss, implicit_prm_loss
from sspo_ext.losses.tokens import full_step_dpo_loss, wpo_weights
from sspo_ext.losses.transport import aot_loss
from sspo_ext.losses.unpaired import kto_loss, kto_reference_point
from sspo_ext.objective.sums import StepLogps, sums_over_steps

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


@pytest.mark.parametrize("case", BAD)
def test_messages(case):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call(*made([[-1.0], [-2.0]], [[-3.0]]))
