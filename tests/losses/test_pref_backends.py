# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss and step_logps: every fused backend against the reference, each gradient alone.

Mutations, each caught by the test named (on a copy of the package):
  mean over all pairs, not the valid ones  test_backend_equals_reference
  reference: label of weight 1 - label     test_backend_equals_reference
  pair weights ignored by the reference    test_backend_equals_reference
  sums' gradient unweighted                test_gradient_through_step_logps
  tokens' gradient lost                    test_gradient_through_step_logps
  upstream gradient lost                   test_backend_equals_reference
"""

# ruff: noqa: E501 (tables of calls and their messages)
import pytest
import torch
from helpers.batch import dtypes_of, fused_backends, pack, random_batch, random_pairs
from helpers.pref import F64, LOSSES, assert_near, loss_and_grad

from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

# name -> (options, whether a reference may be given)
CASES = {
    "sigmoid": {"loss_type": "sigmoid"},
    "sigmoid smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.2, "beta": 0.3},
    "hinge": {"loss_type": "hinge", "beta": 0.05},
    "ipo": {"loss_type": "ipo", "beta": 0.2},
    "simpo": {"loss_type": "simpo", "simpo_gamma": 0.8},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 5.0, "logit_scale": 1.7, "temperature": 1.3},
}


def tolerance(dtype):
    """Against a float64 reference on the same (rounded) logits. Gradients are rounded to the logits' type."""
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_backend_equals_reference(backend, case, seed):
    """Everything at once: token and pair weights, margins, a reference, pairs that share steps, empty steps, dtypes."""
    options = dict(CASES[case])
    for dtype in dtypes_of(backend):
        batch = random_batch(seed, V=37, weighted=True, dtype=dtype)
        layout = batch.layout
        g = torch.Generator().manual_seed(seed)
        P = 9
        values = {"weights": torch.rand(P, generator=g) * 2, "margins": torch.rand(P, generator=g)}
        if options.get("loss_type", "sigmoid") in ("sigmoid", "simpo") and "label_smoothing" not in options:
            values["soft_labels"] = torch.rand(P, generator=g)
        pairs = random_pairs(layout, seed, P, **values)
        ref = None if case == "simpo" else torch.randn(layout.num_steps, generator=g) * 3
        truth, truth_grad = loss_and_grad(
            batch.logits.double(), layout, pairs, ref=ref, upstream=-2.5, backend="reference", **options
        )
        out, grad = loss_and_grad(batch.logits, layout, pairs, ref=ref, upstream=-2.5, backend=backend, **options)
        assert 0 < pairs.num_valid < P and truth_grad.abs().max() > 0
        assert out.loss.dtype == (F64 if dtype == F64 else torch.float32) and grad.dtype == dtype
        rel = tolerance(F64 if dtype == F64 else torch.float32)
        assert_near(out.loss, truth.loss, rel, "loss")
        assert_near(out.step_logps, truth.step_logps, rel, "step_logps")
        assert_near(out.pair_losses, truth.pair_losses, 2 * rel, "pair_losses")
        assert_near(grad, truth_grad, tolerance(dtype), f"d_logits {dtype}")
        assert (grad.reshape(-1, 37)[layout.row_of < 0] == 0).all()


@pytest.mark.parametrize("which", ["sums", "tokens", "both", "expanded"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_through_step_logps(backend, which, weighted):
    """Each output's gradient alone, non-uniform, and an expanded (stride 0) one as .sum() makes."""
    batch = random_batch(2, weighted=weighted)
    layout = batch.layout
    g = torch.Generator().manual_seed(0)
    d_sums = torch.randn(layout.num_steps, generator=g)
    d_tokens = torch.randn(layout.num_rows, generator=g)
    grads = []
    for name, dtype in (("reference", F64), (backend, torch.float32)):
        logits = batch.logits.to(dtype).requires_grad_()
        out = step_logps(logits * 1, layout, backend=name)
        value = {
            "sums": lambda out=out: (out.sums * d_sums).sum(),
            "tokens": lambda out=out: (out.tokens * d_tokens).sum(),
            "both": lambda out=out: (out.sums * d_sums).sum() + (out.tokens * d_tokens).sum(),
            "expanded": lambda out=out: out.sums.sum() + 2 * out.tokens.sum(),
        }[which]()
        value.backward()
        grads.append(logits.grad)
    assert_near(grads[1], grads[0], 2e-6, which)


def test_gradient_from_loss_and_step_logps_together(backend):
    """Two calls on the same logits: autograd adds them up."""
    batch = random_batch(2)
    layout = batch.layout
    grads = []
    for name, dtype in (("reference", F64), (backend, torch.float32)):
        leaf = batch.logits.to(dtype).requires_grad_()
        logits = leaf * 1
        loss = (
            step_pref_loss(logits, layout, backend=name).loss
            - 0.3 * step_logps(logits, layout, backend=name).sums.mean()
        )
        loss.backward()
        grads.append(leaf.grad)
    assert_near(grads[1], grads[0], 2e-6, "d_logits")


@pytest.mark.parametrize(
    "stride", ["batch first", "time first", "padded vocabulary", "sliced time", "vocabulary not contiguous", "expanded"]
)
def test_strides(backend, stride):
    batch = random_batch(1, V=19)
    x = batch.logits
    B, T, V = x.shape
    views = {
        "batch first": x,
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "padded vocabulary": torch.nn.functional.pad(x, (0, 5), value=9.0)[..., :V],
        "sliced time": torch.nn.functional.pad(x, (0, 0, 2, 3), value=float("nan"))[:, 2 : 2 + T],
        "vocabulary not contiguous": x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": x[:1].expand(B, T, V),
    }
    view = views[stride]
    want, want_grad = loss_and_grad(view.double(), batch.layout, backend="reference")
    leaf = view.detach().requires_grad_()
    out = step_pref_loss(leaf, batch.layout, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert_near(out.loss, want.loss, 3e-6, "loss")
    assert_near(grad, want_grad, 3e-6, "d_logits")


@pytest.mark.interpreted
def test_non_contiguous_constants(backend):
    """A reference that is a column of a table, margins that are one number expanded."""
    batch = random_batch(1, B=2, T=10)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 4)
    table = torch.randn(layout.num_steps, 3)
    kw = {"weights": torch.rand(4, 2)[:, 0], "margins": torch.tensor(0.3).expand(4), "soft_labels": torch.rand(8)[::2]}
    outs = [
        step_pref_loss(batch.logits, layout, pairs, ref=table[:, 1], backend=b, **kw).loss
        for b in ("reference", backend)
    ]
    assert_near(outs[1], outs[0], 3e-6, "loss")


def test_same_bits_every_run_and_at_any_thread_count(backend):
    batch = random_batch(3, V=301, weighted=True)
    pairs = random_pairs(batch.layout, 1)
    first = loss_and_grad(batch.logits, batch.layout, pairs, backend=backend)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out, grad = loss_and_grad(batch.logits, batch.layout, pairs, backend=backend)
            assert torch.equal(out.loss, first[0].loss) and torch.equal(grad, first[1])
            assert torch.equal(out.step_logps, first[0].step_logps)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("triton" not in fused_backends(), reason="Triton runs neither on a GPU nor interpreted here")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_triton_equals_reference(loss_type):
    """The public route over the Triton kernels on a small batch; the kernels themselves: test_triton_kernels.py."""
    batch = random_batch(9, B=2, T=7, V=19, weighted=True)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 3, weights=torch.tensor([1.0, 0.5, 2.0]), margins=torch.tensor([0.1, 0.0, 0.3]))
    assert pairs.num_valid >= 2
    ref = None if loss_type == "simpo" else torch.randn(layout.num_steps, generator=torch.Generator().manual_seed(0))
    kw = {"ref": ref, "loss_type": loss_type, "upstream": -2.5, "temperature": 0.8}
    truth, truth_grad = loss_and_grad(batch.logits.double(), layout, pairs, backend="reference", **kw)
    for inplace in (False, True) if loss_type == "sigmoid" else (True,):
        out, grad = loss_and_grad(batch.logits, layout, pairs, backend="triton", inplace_backward=inplace, **kw)
        assert_near(out.loss, truth.loss, 3e-6, "loss")
        assert_near(out.step_logps, truth.step_logps, 3e-6, "step_logps")
        assert_near(grad, truth_grad, 3e-6, "d_logits")


@pytest.mark.skipif("triton" not in fused_backends(), reason="Triton runs neither on a GPU nor interpreted here")
def test_triton_step_logps_equal_the_reference():
    batch = random_batch(9, B=2, T=7, V=19, weighted=True)
    layout = batch.layout
    leaf = batch.logits.clone().requires_grad_()
    out = step_logps(leaf, layout, backend="triton")
    (out.sums.square().sum() + out.tokens.square().sum()).backward()
    want = batch.logits.double().requires_grad_()
    out = step_logps(want, layout, backend="reference")
    (out.sums.square().sum() + out.tokens.square().sum()).backward()
    assert_near(leaf.grad, want.grad, 3e-6, "d_logits through step_logps")


@pytest.mark.parametrize("weighted", [False, True])
def test_packed_equals_padded(backend, weighted):
    """No label leaks across a sequence boundary: same loss, same sums, and every row's gradient where it belongs."""
    batch = random_batch(5, B=6, weighted=weighted)
    logits, layout, labels, cu = pack(batch)
    for name in ("reference", backend):
        padded, padded_grad = loss_and_grad(batch.logits, batch.layout, backend=name)
        for shape in (logits, logits[None]):
            packed, packed_grad = loss_and_grad(shape, layout, backend=name)
            assert torch.equal(packed.loss, padded.loss) and torch.equal(packed.step_logps, padded.step_logps)
            flat = packed_grad.reshape(-1, packed_grad.shape[-1])
            for b in range(6):
                assert torch.equal(flat[cu[b] : cu[b + 1]], padded_grad[b, : cu[b + 1] - cu[b]])
            assert (flat[cu[1:] - 1] == 0).all(), "a sequence's last position predicts nothing"
