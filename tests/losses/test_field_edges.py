# SPDX-License-Identifier: Apache-2.0
"""The edges at which other libraries crash, give NaN or, silently, a wrong number (each case names who).

Mutations, each caught by the test named (on a copy of the package):
  scored: padding's labels             test_ignored_labels_are_no_rows_and_get_no_gradient
  V not checked at the loss            test_labels_out_of_range_raise_before_any_kernel
  an empty step's pair scored          test_mixed_dtypes
  ids checked, labels not              test_labels_out_of_range_raise_before_any_kernel
  softcap after the temperature        test_softcap_order
  reference of another dtype not cast  test_mixed_dtypes
"""

import math

import pytest
import torch
from helpers.batch import dtypes_of, fused_backends, random_batch, random_pairs

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

LOSSES = ["sigmoid", "hinge", "ipo", "simpo"]


# Case: label -100 or >= V inside the log-prob function. TRL, prime-rl and Liger's dual chunk give the finite wrong
# value -logZ, with gradient.


@pytest.mark.interpreted
def test_ignored_labels_are_no_rows_and_get_no_gradient(backend):
    labels = torch.tensor([[3, -100, 2, -100], [3, 1, -100, -100]])
    ids = torch.zeros_like(labels)
    logits = torch.randn(2, 4, 5, requires_grad=True)
    out = step_logps(logits, StepLayout.from_step_ids(labels, ids), backend=backend)
    out.sums.sum().backward()
    want = logits.detach().log_softmax(-1)
    torch.testing.assert_close(out.sums.detach(), torch.stack([want[0, 1, 2], want[1, 0, 1]]))
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("bad", [5, 6, 2**31 + 3, -1, -99])
def test_labels_out_of_range_raise_before_any_kernel(backend, bad):
    labels = torch.tensor([[0, 1, bad, 2]])
    logits, ids = torch.randn(1, 4, 5), torch.zeros(1, 4, dtype=torch.long)
    match = rf"labels: expected values in \[0, .*got {bad} in sequence 0 at position 2"
    with pytest.raises(ValueError, match=match):
        step_pref_loss(logits, labels, ids, pairs=torch.zeros(0, 2).long(), backend=backend)
    with pytest.raises(ValueError, match=match):
        step_logps(logits, StepLayout.from_step_ids(labels, ids), backend=backend)


# Case: N = 0, no valid tokens on this rank. Liger's scaled cross-entropy raises ValueError. (All kinds of nothing:
# test_pref.py)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_valid_tokens_on_this_rank(backend, loss_type):
    logits = torch.randn(2, 4, 5, requires_grad=True)
    out = step_pref_loss(logits, torch.full((2, 4), -100), torch.full((2, 4), -1), loss_type=loss_type, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and (logits.grad == 0).all()


# Case: hidden and head of different dtypes belongs to the linear route. Here: logits, reference and weights of
# different dtypes.


def test_mixed_dtypes(backend):
    batch = random_batch(1)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 5)
    g = torch.Generator().manual_seed(0)
    ref, weights = torch.randn(layout.num_steps, generator=g), torch.rand(5, generator=g)
    for dtype in dtypes_of(backend):
        logits = batch.logits.to(dtype)
        want = step_pref_loss(logits.double(), layout, pairs, ref=ref, weights=weights, backend="reference").loss
        for other in (torch.float64, torch.bfloat16, torch.float16):
            got = step_pref_loss(logits, layout, pairs, ref=ref.to(other), weights=weights.to(other), backend=backend)
            assert got.loss.item() == pytest.approx(want.item(), rel=2e-2 if other != torch.float64 else 1e-5)
            assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Case: fp16 logits up to 65504 (and a sum of exponentials beyond it): NaN everywhere in the field; float32
# accumulation stays finite.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_stay_finite(backend, dtype):
    top = 65504.0 if dtype == torch.float16 else 3e38 if dtype == torch.float32 else 3.38e38
    logits = torch.zeros(2, 3, 300, dtype=dtype)
    logits[:, 0, 7] = top  # the label's own
    logits[:, 1] = 60000.0  # all large and equal
    labels, ids = torch.full((2, 3), 7), torch.tensor([[-1, 0, 0]] * 2)
    logits.requires_grad_()
    out = step_logps(logits, StepLayout.from_step_ids(labels, ids), backend=backend)
    out.sums.sum().backward()
    assert out.tokens.tolist() == pytest.approx([0.0, -math.log(300)] * 2, abs=1e-5)
    assert logits.grad.isfinite().all()
    # where the label is far below: minus the distance, still finite
    logits = torch.zeros(1, 2, 300, dtype=dtype)
    logits[0, 0, 0] = 65504.0
    tokens = step_logps(logits, StepLayout.from_step_ids(labels[:1, :2], ids[:1, :2]), backend=backend).tokens
    assert tokens.item() == pytest.approx(-float(torch.tensor(65504.0).to(dtype)), rel=1e-6)


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_gradient_at_large_logits(backend, size):
    """log-sum-exp kept in the type of the log-probs would be off by 5e-4 at 1e4, and the softmax with it."""
    batch = random_batch(0, V=50)
    logits = (
        batch.logits
        + size
        * torch.where(torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)[
            ..., None
        ]
    )
    grads = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        leaf = logits.to(dtype).requires_grad_()
        step_logps(leaf, batch.layout, backend=name).sums.sum().backward()
        grads.append(leaf.grad.double())
    assert (grads[1] - grads[0]).abs().max() < 2e-6


# Case: all completion tokens masked with per-token means. Liger DPO with average_log_prob: NaN.


@pytest.mark.parametrize("loss_type", ["ipo", "simpo"])
def test_all_tokens_of_a_completion_masked(backend, loss_type):
    batch = random_batch(0)
    batch.labels[2:] = -100  # every rejected sequence
    logits = batch.logits.clone().requires_grad_()
    out = step_pref_loss(logits, batch.layout, loss_type=loss_type, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and (logits.grad == 0).all()
    batch = random_batch(0)
    batch.labels[3] = -100  # one of them
    logits = batch.logits.clone().requires_grad_()
    out = step_pref_loss(logits, batch.layout, loss_type=loss_type, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite() and out.loss > 0 and logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all() and (logits.grad[3] == 0).all()
    assert step_logps(batch.logits, batch.layout, backend=backend).means.isfinite().all()


# Case: double backward. prime-rl and Liger's dual chunk are silently wrong (test_pref.py); the reference is right:


def test_the_reference_has_a_right_second_derivative():
    batch = random_batch(4, T=7, V=5, dtype=torch.float64)
    layout = batch.layout
    pairs = random_pairs(layout, 0, P=5)

    def loss(x):
        return step_pref_loss(x, layout, pairs, backend="reference", loss_type="ipo").loss

    assert pairs.num_valid > 0
    assert torch.autograd.gradgradcheck(loss, batch.logits.requires_grad_())


# Case: gradcheck in float64. Only naive code and torch's own pass; everyone else hard-codes float32.


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck_of_every_float64_backend(loss_type):
    batch = random_batch(4, T=8, V=5, weighted=True, dtype=torch.float64)
    layout = batch.layout
    pairs = random_pairs(layout, 0, P=5)
    for name in fused_backends(torch.float64):
        assert torch.autograd.gradcheck(
            lambda x, name=name: (
                step_pref_loss(x, layout, pairs, loss_type=loss_type, backend=name, temperature=0.8).loss
            ),
            batch.logits.clone().requires_grad_(),
        )
        assert torch.autograd.gradcheck(
            lambda x, name=name: (lambda out: (out.sums, out.tokens))(
                step_logps(x, layout, backend=name, logit_softcap=4.0)
            ),
            batch.logits.clone().requires_grad_(),
        )


# Case: a log-probability above 0 (verl#2656). The label holds nearly all of the mass.


@pytest.mark.interpreted
def test_no_log_probability_above_zero(backend):
    g = torch.Generator().manual_seed(0)
    for dtype in dtypes_of(backend)[: 1 if backend == "triton" else None]:
        logits = torch.randn(1, 65, 1000, generator=g).to(dtype)
        labels = torch.randint(0, 1000, (1, 65), generator=g)
        logits[0, torch.arange(64), labels[0, 1:]] += torch.linspace(5, 60, 64).to(dtype)
        tokens = step_logps(logits, StepLayout.from_step_ids(labels, torch.zeros_like(labels)), backend=backend).tokens
        assert (tokens <= 0).all() and (tokens[-1] > -1e-6)


# Case: non-finite logits. They reach the loss, and nothing else is read.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_reach_the_loss(backend, value):
    batch = random_batch(0)
    layout = batch.layout
    row = int(layout.rows[0])
    for column in (int(layout.labels[0]), (int(layout.labels[0]) + 1) % 11):
        logits = batch.logits.clone()
        logits.view(-1, 11)[row, column] = value
        out = step_logps(logits, layout, backend=backend)
        assert out.tokens[0].isnan() and out.sums[layout.step_of_row[0]].isnan()
        assert out.tokens[1:].isfinite().all()
        for loss_type in LOSSES:
            pairs = [[int(layout.step_of_row[0]), int(layout.step_of_row[-1])]]
            loss = step_pref_loss(logits, layout, torch.tensor(pairs), backend=backend, loss_type=loss_type).loss
            assert loss.isnan(), loss_type


def test_masked_vocabulary_is_legal(backend):
    """-inf at other entries: probability 0, gradient 0."""
    batch = random_batch(0)
    layout = batch.layout
    logits = batch.logits.clone()
    flat = logits.view(-1, 11)
    for n in range(layout.num_rows):
        flat[layout.rows[n], (layout.labels[n] + 1 + n % 5) % 11] = float("-inf")
    logits.requires_grad_()
    out = step_logps(logits, layout, backend=backend)
    out.sums.sum().backward()
    reference = step_logps(logits.detach().double(), layout, backend="reference")
    torch.testing.assert_close(out.tokens.double(), reference.tokens, rtol=1e-5, atol=1e-6)
    assert logits.grad.isfinite().all()
    assert (logits.grad[logits.detach().isneginf()] == 0).all()


def test_unscored_rows_are_neither_read_nor_left_unwritten(backend):
    batch = random_batch(0)
    layout = batch.layout
    for inplace in (False, True):
        logits = batch.logits.clone()
        logits.view(-1, 11)[layout.row_of < 0] = float("nan")
        logits.requires_grad_()
        out = step_pref_loss(logits * 1, layout, backend=backend, inplace_backward=inplace)
        out.loss.backward()
        assert out.loss.isfinite() and logits.grad.isfinite().all()
        assert (logits.grad.view(-1, 11)[layout.row_of < 0] == 0).all()


# Case: verl's phantom vocabulary mass: V not a multiple of a block, logits all negative (a phantom 0 would hold all
# of the mass).


@pytest.mark.parametrize("V", [1, 2, 3, 7, 8, 9, 31, 33, 127, 129, 251, 1000, 1023, 1025])
def test_no_phantom_vocabulary_mass(backend, V):
    for dtype in dtypes_of(backend):
        logits = (-60 - torch.rand(1, 4, V, generator=torch.Generator().manual_seed(V))).to(dtype)
        labels = torch.tensor([[0, V - 1, V // 2, 0]])
        ids = torch.zeros(1, 4, dtype=torch.long)
        leaf = logits.clone().requires_grad_()
        out = step_logps(leaf, StepLayout.from_step_ids(labels, ids), backend=backend)
        out.sums.sum().backward()
        want = logits.double().log_softmax(-1)[0, torch.arange(3), labels[0, 1:]]
        torch.testing.assert_close(out.tokens.double(), want, rtol=1e-5, atol=1e-5)
        assert leaf.grad.sum(-1).abs().max() < (1e-5 if dtype in (torch.float32, torch.float64) else 2e-2)


# Case: Liger#1294, a grid limit at T >= 65536.


def test_more_than_65536_positions():
    T = 65_600
    labels = torch.zeros(1, T, dtype=torch.long)
    ids = torch.full((1, T), -1)
    ids[0, [1, 40_000, 65_590]] = torch.tensor([0, 1, 2])
    logits = torch.randn(1, T, 3, requires_grad=True)
    layout = StepLayout.from_step_ids(labels, ids)
    for name in (b for b in fused_backends() if b != "triton"):  # interpreted, a launch takes a program per position
        logits.grad = None
        out = step_logps(logits, layout, backend=name)
        out.sums.sum().backward()
        want = logits.detach().log_softmax(-1)[0, [0, 39_999, 65_589], 0]
        torch.testing.assert_close(out.tokens.detach(), want)
        assert torch.nonzero(logits.grad[0].abs().sum(-1)).flatten().tolist() == [0, 39_999, 65_589]


# Case: a stale or wrong softcap order (unsloth-zoo#593): scale, then cap, then temperature.


@pytest.mark.interpreted
def test_softcap_order(backend):
    logits = torch.tensor([[[0.0, 3.0, -1.0], [0.0, 0.0, 0.0]]])
    layout = StepLayout.from_step_ids(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]))
    got = step_logps(logits, layout, backend=backend, logit_scale=2.0, logit_softcap=4.0, temperature=0.5).tokens.item()
    z = [4 * math.tanh(2 * x / 4) / 0.5 for x in (0.0, 3.0, -1.0)]
    assert got == pytest.approx(z[1] - math.log(sum(math.exp(v) for v in z)), abs=2e-6)  # -.00073
