# SPDX-License-Identifier: Apache-2.0
"""The reference backend is the specification: tested against hand-made numbers and loops over tokens.

Mutations of sspo_ext/backends/reference.py and logps.logit_map, each caught by the test named (on a copy of the
package):
  softcap: temperature inside the tanh  test_logit_map
  temperature multiplies                test_token_logps_golden
  reference: half precision not upcast  test_half_precision_accumulates_in_float32
  reference: weights ignored            test_step_logps_equal_the_oracle
  reference: reference sums added       test_loss_golden
  reference: an empty step is scored    test_float64_is_exact_to_float64
  reference: pair order swapped         test_loss_golden
  means divide by zero                  test_step_logps_equal_the_oracle
  float64 mean through float32          test_float64_is_exact_to_float64
"""

import math

import pytest
import torch
from helpers.batch import oracle_steps, random_batch, random_pairs

from sspo_ext.backends import reference
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.routes.shared import logit_map

F64 = torch.float64


def test_token_logps_golden():
    # logits ln(1), ln(2), ln(5): probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=F64).log().expand(1, 2, 3)
    logps = reference.token_logps(logits, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), 1.0, 0.0)
    assert logps.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-14)
    # temperature 1/2 squares them: 1, 4, 25 of 30
    a, c = logit_map(0.5, None, 1.0)
    logps = reference.token_logps(logits, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), a, c)
    assert logps.exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30], rel=1e-14)


def test_logit_map():
    x = torch.linspace(-50, 50, 7, dtype=F64)
    for temperature, cap, scale in [(1.0, None, 1.0), (0.7, None, 0.25), (1.0, 30.0, 1.0), (0.6, 5.0, 3.0)]:
        want = x * scale
        want = want if cap is None else cap * torch.tanh(want / cap)
        got = reference.map_logits(x, *logit_map(temperature, cap, scale))
        torch.testing.assert_close(got, want / temperature, rtol=1e-14, atol=0)
    for name, bad in [
        ("temperature", (0.0, None, 1.0)),
        ("logit_softcap", (1.0, -30.0, 1.0)),
        ("logit_scale", (1.0, None, float("nan"))),
    ]:
        with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0"):
            logit_map(*bad)
    for name, beyond in [  # each a finite number above 0, but not what the kernels make of them
        ("logit_softcap / temperature", (1.0, 3e38, 1e20)),
        ("logit_softcap / temperature", (1e-10, 1e25, 1.0)),
        ("logit_scale / logit_softcap", (1.0, 1e38, 1.0)),
        ("logit_scale / temperature", (1e-39, None, 1.0)),
        ("logit_scale / temperature", (1.0, None, 1e200)),
        ("logit_scale / temperature", (1e-300, None, 1e300)),  # their ratio is infinite
        ("logit_scale / temperature", (1e300, None, 1e-300)),  # and 0
    ]:
        with pytest.raises(ValueError, match=f"{name}: expected a number from 1e-32 to 1e.32, since kernels hold it"):
            logit_map(*beyond)
    with pytest.raises(TypeError, match="temperature: expected a number, got True"):
        logit_map(True, None, 1.0)
    with pytest.raises(TypeError, match="temperature: expected a number, got torch.float32 tensor"):
        logit_map(torch.ones(2), None, 1.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"logit_scale": 0.5}, {"logit_softcap": 4.0, "temperature": 1.5, "logit_scale": 2.0}],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_step_logps_equal_the_oracle(options, weighted):
    batch = random_batch(5, weighted=weighted, dtype=F64)
    if weighted:
        batch.token_weights = batch.token_weights.double()
    renamed = {{"logit_softcap": "softcap", "logit_scale": "scale"}.get(k, k): v for k, v in options.items()}
    sums, counts, tokens = oracle_steps(batch, **renamed)
    out = step_logps(batch.logits, batch.layout, backend="reference", **options)
    torch.testing.assert_close(out.tokens, tokens, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.sums, sums, rtol=1e-13, atol=1e-13)
    assert out.counts.tolist() == counts
    means = [s / n if n else 0.0 for s, n in zip(sums.tolist(), counts, strict=True)]
    assert out.means.tolist() == pytest.approx(means, rel=1e-13)


def test_loss_golden():
    """Two sequences of one step of two tokens, probabilities 1/8, 2/8, 5/8 everywhere; beta = 1.

    chosen: labels 2, 2: S = 2 ln(5/8); rejected: labels 0, 1: S = ln(1/8) + ln(2/8). u_w - u_l = ln(25/64 / (2/64)) =
    ln 12.5.
    sigmoid: -log(12.5 / 13.5). Reference sums ln(1/2) and ln(1/4) take ln 2 off: 6.25 / 7.25.
    """
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=F64).log().repeat(2, 3, 1)
    labels, ids = torch.tensor([[0, 2, 2], [0, 0, 1]]), torch.tensor([[-1, 0, 0], [-1, 0, 0]])
    out = step_pref_loss(logits, labels, ids, beta=1.0, backend="reference")
    assert out.loss.item() == pytest.approx(math.log(13.5 / 12.5), rel=1e-12)
    assert out.step_logps.tolist() == pytest.approx([2 * math.log(5 / 8), math.log(2 / 64)], rel=1e-12)
    ref = torch.tensor([0.5, 0.25], dtype=F64).log()
    out = step_pref_loss(logits, labels, ids, ref=ref, beta=1.0, backend="reference")
    assert out.loss.item() == pytest.approx(math.log(7.25 / 6.25), rel=1e-12)


def test_float64_is_exact_to_float64():
    """P = 3: a mean taken as a product with float32(1/3) would be off by 3e-8."""
    batch = random_batch(1, B=6, dtype=F64)
    layout = batch.layout
    sums, counts, _ = oracle_steps(batch)
    full = [k for k, n in enumerate(counts) if n]
    pairs = StepPairs.from_index(layout, [[full[0], full[3]], [full[1], full[4]], [full[2], full[5]]])
    losses = [
        math.log1p(math.exp(-0.1 * float(sums[w] - sums[b]))) if counts[w] and counts[b] else 0.0
        for w, b in pairs.index.tolist()
    ]
    out = step_pref_loss(batch.logits, layout, pairs, backend="reference")
    assert out.loss.item() == pytest.approx(sum(losses) / pairs.num_valid, rel=1e-13)
    out = step_pref_loss(batch.logits, layout, pairs, num_items=7, backend="reference")
    assert out.loss.item() == pytest.approx(sum(losses) / 7, rel=1e-13)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_gradcheck(loss_type):
    batch = random_batch(4, T=8, V=5, weighted=True, dtype=F64)
    layout = batch.layout
    pairs = random_pairs(layout, 0, P=5)
    ref = None if loss_type == "simpo" else torch.randn(layout.num_steps, dtype=F64)

    def loss(logits):
        return step_pref_loss(
            logits, layout, pairs, ref=ref, loss_type=loss_type, backend="reference", temperature=0.8, logit_softcap=6.0
        ).loss

    assert pairs.num_valid > 0
    assert torch.autograd.gradcheck(loss, batch.logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, batch.logits[:1].detach().repeat(4, 1, 1).requires_grad_(), atol=1e-4)


def test_gradcheck_step_logps():
    batch = random_batch(4, T=8, V=5, weighted=True, dtype=F64)

    def values(logits):
        out = step_logps(logits, batch.layout, backend="reference")
        return out.sums, out.tokens

    assert torch.autograd.gradcheck(values, batch.logits.requires_grad_())


def test_half_precision_accumulates_in_float32():
    batch = random_batch(2, V=1000, dtype=torch.bfloat16)
    out = step_logps(batch.logits, batch.layout, backend="reference")
    assert out.sums.dtype == out.tokens.dtype == torch.float32
    sums, _, _ = oracle_steps(batch)  # of the bfloat16 logits, upcast
    torch.testing.assert_close(out.sums.double(), sums, rtol=1e-6, atol=1e-6)


def test_pair_losses_of_an_empty_step_are_zero_with_zero_gradient():
    sums = torch.tensor([-3.0, 0.0, -5.0], dtype=F64, requires_grad=True)
    counts, index = torch.tensor([2, 0, 3]), torch.tensor([[0, 1], [2, 0], [1, 2]])
    losses = reference.pair_losses(sums, counts, None, index, None, None, "ipo", [0.1], 1.0)
    assert losses[0] == 0 and losses[2] == 0 and losses[1] != 0
    (grad,) = torch.autograd.grad(losses.sum(), sums)
    assert grad[1] == 0 and grad[0] != 0 and grad[2] != 0


def test_unscored_rows_are_not_read():
    batch = random_batch(0, dtype=F64)
    layout = batch.layout
    want = step_pref_loss(batch.logits, layout, backend="reference")
    poisoned = batch.logits.clone()
    poisoned.view(-1, poisoned.shape[-1])[layout.row_of < 0] = float("nan")
    poisoned.requires_grad_()
    got = step_pref_loss(poisoned, layout, backend="reference")
    got.loss.backward()
    assert got.loss == want.loss
    assert (poisoned.grad.view(-1, poisoned.shape[-1])[layout.row_of < 0] == 0).all()


def test_layout_is_checked():
    layout = StepLayout.from_step_ids(torch.tensor([[1, 2]]), torch.tensor([[-1, 0]]))
    with pytest.raises(
        TypeError, match="logits: expected a tensor of float32, bfloat16, float16, float64, got torch.int64"
    ):
        step_logps(torch.zeros(1, 2, 3, dtype=torch.long), layout)
    with pytest.raises(ValueError, match="layout: expected it on meta, where logits is"):
        step_logps(torch.zeros(1, 2, 3, device="meta"), layout)
