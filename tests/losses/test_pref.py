"""step_pref_loss and step_logps: fused backends against the reference, each gradient alone; the public contract.

Mutations of sspo_ext/{losses,logps,autograd}.py and ops.py, each caught by the test named (on a copy of the package):
  mean over all pairs, not the valid ones  test_backend_equals_reference
  reference: label of weight 1 - label     test_backend_equals_reference
  pair weights ignored by the reference    test_backend_equals_reference
  sums' gradient unweighted                test_gradient_through_step_logps
  tokens' gradient lost                    test_gradient_through_step_logps
  upstream gradient lost                   test_backend_equals_reference
  num_items ignored beside reduction       test_normalisers
  num_items 0 gives inf                    test_nothing_to_score
  ref from a StepLogps by its sums         test_ref_is_weighted_as_the_loss_is
  ref (B, T) not shifted                   test_ref_in_every_form
  ref by token unweighted                  test_ref_in_every_form
  ref summed by index_add in float32       test_ref_is_summed_as_well_as_the_policy
  a dropped pair's weight kept             test_a_dropped_pairs_weight_is_never_read
  metrics average over dropped pairs       test_dropped_pairs_are_not_in_the_mean
  ties count as accurate                   test_equal_rewards_are_not_accurate
  rewards without beta                     test_metrics_by_hand
  smoothing accepted where there is none   test_messages
  stale pairs accepted                     test_pairs_of_another_layout_are_refused
  in place without the version             test_inplace_makes_a_later_reader_error
  second derivative not refused            test_a_second_derivative_raises
  in place writes a new buffer             test_inplace_gives_the_same_gradient_in_the_logits_memory
"""
# ruff: noqa: E501 (tables of calls and their messages)

import math

import pytest
import torch
from helpers.batch import Batch, dtypes_of, fused_backends, oracle_steps, pack, random_batch, random_pairs

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import StepPrefLoss, step_pref_loss
from sspo_ext.objective.sums import StepLogps

F64 = torch.float64
LOSSES = ["sigmoid", "hinge", "ipo", "simpo"]
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


def loss_and_grad(logits, *args, upstream=1.0, **kw):
    logits = logits.detach().clone().requires_grad_()
    out = step_pref_loss(logits * 1, *args, **kw)
    (out.loss * upstream).backward()
    return out, logits.grad


def assert_near(got, want, rel, what):
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    bound = rel * (want.double().abs().max().item() if want.numel() else 0.0) + 1e-3 * rel
    assert got.shape == want.shape and error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


# ---- backends against the reference


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


# ---- in place, second derivatives


def test_inplace_gives_the_same_gradient_in_the_logits_memory(backend):
    for dtype in dtypes_of(backend):
        batch = random_batch(1, dtype=dtype)
        _, want = loss_and_grad(batch.logits, batch.layout, backend=backend)
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1
        seen = []
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=True).loss.backward()
        assert torch.equal(leaf.grad, want)
        assert seen == [logits.data_ptr()], "no second buffer"
        assert torch.equal(logits.detach(), want)


@pytest.mark.parametrize("view", ["time first", "padded vocabulary", "packed"])
def test_inplace_on_views(backend, view):
    batch = random_batch(1, V=19)
    x, layout = batch.logits, batch.layout
    if view == "packed":
        x, layout, _, _ = pack(batch)
    _, want = loss_and_grad(x, layout, backend=backend)
    leaf = x.clone().requires_grad_()
    if view == "time first":
        logits = (leaf.transpose(0, 1) * 1).transpose(0, 1)
    elif view == "padded vocabulary":
        logits = torch.nn.functional.pad(leaf, (0, 5))[..., :19]
    else:
        logits = leaf * 1
    step_pref_loss(logits, layout, backend=backend, inplace_backward=True).loss.backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("later", ["another loss", "pow", "the same loss again"])
def test_inplace_makes_a_later_reader_error(backend, later):
    """Whoever still needs the logits gets autograd's error, not numbers computed from a gradient."""
    batch = random_batch(1)
    logits = batch.logits.clone().requires_grad_() * 1
    other = {
        "another loss": lambda: step_pref_loss(logits, batch.layout, backend=backend).loss,
        "pow": lambda: logits.pow(2).sum(),
        "the same loss again": lambda: None,
    }[later]()
    loss = step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss if other is None else other).backward()


def test_inplace_beside_a_reader_that_needs_no_values(backend):
    batch = random_batch(1)
    grads = []
    for inplace in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        logits = leaf * 1
        (
            step_pref_loss(logits, batch.layout, backend=backend, inplace_backward=inplace).loss + 0.5 * logits.sum()
        ).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_inplace_refuses_what_it_cannot_do(backend):
    batch = random_batch(1)
    expanded = batch.logits[:1].requires_grad_().expand(4, -1, -1)
    with pytest.raises(ValueError, match="inplace_backward"):
        step_pref_loss(expanded, batch.layout, backend=backend, inplace_backward=True)
    with pytest.raises(ValueError, match="inplace_backward: .*reference"):
        step_pref_loss(batch.logits, batch.layout, backend="reference", inplace_backward=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_raises(backend, inplace):
    """Liger's dual chunk and prime-rl give a wrong number here: the gradient of a loss is taken for a constant.

    The weight of a head makes it matter: d loss/d hidden depends on it through the loss's own gradient, too.
    """
    batch = random_batch(1)
    weight = torch.randn(11, 11, requires_grad=True)
    hidden = batch.logits.clone().requires_grad_()
    for outputs in (
        lambda x: step_pref_loss(x, batch.layout, backend=backend, inplace_backward=inplace).loss,
        lambda x: step_logps(x, batch.layout, backend=backend, inplace_backward=inplace).sums.sum(),
    ):
        with pytest.raises(RuntimeError, match="sspo_ext: .*backend='reference'"):
            (grad,) = torch.autograd.grad(outputs(hidden @ weight), hidden, create_graph=True)
            torch.autograd.grad(grad.pow(2).sum(), weight)


def test_no_gradient_wanted(backend):
    batch = random_batch(1)
    assert not step_pref_loss(batch.logits, batch.layout, backend=backend).loss.requires_grad
    with torch.no_grad():
        assert not step_logps(batch.logits.requires_grad_(), batch.layout, backend=backend).sums.requires_grad
    out = step_pref_loss(batch.logits, batch.layout, backend=backend)
    assert out.loss.requires_grad
    assert not out.step_logps.requires_grad and not out.pair_losses.requires_grad and not out.rewards.requires_grad
    assert not any(m.requires_grad for m in out.metrics.values())


# ---- nothing to score


def nothing(kind: str) -> tuple[Batch, dict]:
    batch = random_batch(0)
    if kind == "no rows":
        batch.step_ids.fill_(-1)
    elif kind == "labels all ignored":
        batch.labels.fill_(-100)
    elif kind == "weights all zero":
        batch.token_weights = torch.zeros_like(batch.labels, dtype=torch.float32)
    elif kind == "no pairs":
        return batch, {"pairs": torch.zeros(0, 2, dtype=torch.long)}
    elif kind == "every pair dropped":
        batch.labels[2:] = -100
    elif kind == "no sequences":
        batch = Batch(
            torch.zeros(0, 5, 7), torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long), None
        )
    elif kind == "no positions":
        batch = Batch(
            torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), None
        )
    return batch, {}


KINDS = [
    "no rows",
    "labels all ignored",
    "weights all zero",
    "no pairs",
    "every pair dropped",
    "no sequences",
    "no positions",
]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_score(kind, loss_type, backend):
    for name in ("reference", backend):
        for num_items in (None, 0, torch.tensor(0), torch.tensor(3)):
            batch, kw = nothing(kind)
            logits = batch.logits.clone().requires_grad_()
            out = step_pref_loss(logits, batch.layout, backend=name, loss_type=loss_type, num_items=num_items, **kw)
            out.loss.backward()  # still part of the graph: a trainer's backward must not fail on such a rank
            assert out.loss == 0 and (logits.grad == 0).all() and logits.grad.shape == logits.shape
            values = {k: v.item() for k, v in out.metrics.items()}
            assert all(v == 0 for k, v in values.items() if k.startswith(("rewards", "pairs/count"))), values
            assert all(math.isfinite(v) for v in values.values())
            sums = step_logps(logits, batch.layout, backend=name).sums
            sums.sum().backward()
            assert sums.isfinite().all()


def test_dropped_pairs_are_not_in_the_mean(backend):
    batch = random_batch(0)
    layout = batch.layout
    full = [k for k in range(layout.num_steps) if layout.counts[k] > 0]
    empty = [k for k in range(layout.num_steps) if layout.counts[k] == 0]
    good, bad = [[full[0], full[-1]], [full[1], full[2]]], [[full[0], empty[0]], [empty[0], full[1]]]
    for name in ("reference", backend):
        for reduction in ("mean", "sum"):
            clean = step_pref_loss(batch.logits, layout, torch.tensor(good), reduction=reduction, backend=name)
            mixed = step_pref_loss(
                batch.logits, layout, torch.tensor(bad[:1] + good + bad[1:]), reduction=reduction, backend=name
            )
            assert torch.equal(clean.loss, mixed.loss)
        assert mixed.pair_losses[[0, 3]].tolist() == [0, 0] and mixed.pair_losses[1:3].gt(0).all()
        assert mixed.metrics["pairs/count"] == 2 and mixed.metrics["pairs/dropped"] == 2
        for key in clean.metrics:
            if not key.startswith("pairs/"):
                assert torch.equal(clean.metrics[key], mixed.metrics[key]), key


def test_a_dropped_pairs_weight_is_never_read(backend):
    batch = random_batch(0)
    counts = batch.layout.counts
    full, empty = torch.nonzero(counts > 0).flatten(), torch.nonzero(counts == 0).flatten()
    pairs = torch.stack([torch.stack([full[0], full[-1]]), torch.stack([full[0], empty[0]])])
    want, gradient = loss_and_grad(batch.logits, batch.layout, pairs, weights=torch.tensor([2.0, 0.0]))
    for name in ("reference", backend):
        for none in (float("nan"), float("inf")):
            got, again = loss_and_grad(
                batch.logits, batch.layout, pairs, weights=torch.tensor([2.0, none]), backend=name
            )
            torch.testing.assert_close(got.loss, want.loss)
            torch.testing.assert_close(again, gradient)


# ---- the arguments


def test_ref_in_every_form(backend):
    batch = random_batch(3, weighted=True)
    layout = batch.layout
    other = Batch(random_batch(7).logits, batch.labels, batch.step_ids, batch.token_weights)
    ref = step_logps(other.logits, layout, backend="reference")
    by_token = torch.zeros(batch.labels.shape)
    by_token.reshape(-1)[layout.rows + 1] = ref.tokens
    by_token.masked_fill_(by_token == 0, float("nan"))  # never read where nothing is scored
    pairs = layout.pair_by_index()
    for name in ("reference", backend):
        want = step_pref_loss(batch.logits, layout, pairs, ref=ref.sums, backend=name)
        for form in (ref, ref.tokens, by_token, ref.sums.double(), ref.tokens.clone().requires_grad_()):
            got = step_pref_loss(batch.logits, layout, pairs, ref=form, backend=name)
            torch.testing.assert_close(got.loss, want.loss, rtol=2e-6, atol=0)
            assert not got.loss.requires_grad and not got.ref.requires_grad
        assert not torch.equal(want.loss, step_pref_loss(batch.logits, layout, pairs, backend=name).loss)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_ref_is_summed_as_well_as_the_policy(name):
    """The same model as its own reference over a long step: rewards of exactly 0, however the reference is given."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40_001, 5, generator=g)
    layout = StepLayout.from_step_ids(torch.randint(5, (2, 40_001), generator=g), torch.zeros(2, 40_001).long())
    ref = step_logps(logits, layout, backend=name)
    exact = step_logps(logits.double(), layout).sums
    assert (ref.sums - exact).abs().max() < 1e-7 * exact.abs().max()
    for form in (ref, ref.tokens, ref.sums):
        out = step_pref_loss(logits, layout, torch.tensor([[0, 1]]), ref=form, backend=name)
        assert out.rewards.tolist() == [0, 0]


def test_ref_is_weighted_as_the_loss_is():
    """The same model as its own reference: rewards 0, whatever the weights at the loss."""
    batch = random_batch(3)
    layout = batch.layout
    ref = step_logps(batch.logits, layout, backend="reference")
    weights = torch.rand(layout.num_rows) + 0.5
    for form in (ref, ref.tokens):
        out = step_pref_loss(batch.logits, layout, ref=form, token_weights=weights, backend="reference")
        assert out.rewards.abs().max() < 1e-6


def test_ref_that_could_be_two_things_is_refused():
    # 4 rows, 4 steps: one of two rows, one empty
    ids = torch.tensor([[-1, 0, 0], [-1, 1, 1]])
    layout = StepLayout.from_step_ids(torch.ones_like(ids), torch.tensor([[-1, 0, 1], [-1, 1, 1]]))
    assert layout.num_rows == layout.num_steps == 4
    logits = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="ref: .*may be step sums or token log-probs"):
        step_pref_loss(logits, layout, ref=torch.zeros(4), backend="reference")
    # one row per step: the two are the same, except under weights
    layout = StepLayout.from_step_ids(torch.ones_like(ids), torch.tensor([[-1, 0, 1], [-1, 0, 1]]))
    step_pref_loss(logits, layout, ref=torch.zeros(4), backend="reference")
    with pytest.raises(ValueError, match="ref: .*may be step sums or token log-probs"):
        step_pref_loss(logits, layout, ref=torch.zeros(4), token_weights=torch.full((4,), 2.0), backend="reference")


def test_packed_ref():
    batch = random_batch(3)
    logits, layout, _, _ = pack(batch)
    ref = step_logps(logits * 0.5, layout, backend="reference")
    by_token = torch.zeros(layout.shape[1])
    by_token[layout.rows + 1] = ref.tokens
    want = step_pref_loss(logits, layout, ref=ref.sums, backend="reference").loss
    for form in (by_token, by_token[None]):
        torch.testing.assert_close(step_pref_loss(logits, layout, ref=form, backend="reference").loss, want)


def test_normalisers(backend):
    batch = random_batch(3)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 7)
    for name in ("reference", backend):

        def grad_of(name=name, **kw):
            out, grad = loss_and_grad(batch.logits, layout, pairs, backend=name, **kw)
            return out.loss.item(), grad

        total, total_grad = grad_of(reduction="sum")
        n = pairs.num_valid
        assert 0 < n < 7
        for divisor, kw in [
            (n, {}), (n, {"reduction": "mean"}), (12.5, {"num_items": 12.5}), (40, {"num_items": torch.tensor(40)}),
            (40, {"num_items": 40, "reduction": "sum"}), (3, {"num_items": torch.tensor(3.0, dtype=F64)}),
        ]:  # fmt: skip
            value, grad = grad_of(**kw)
            assert value == pytest.approx(total / divisor, rel=2e-6), kw
            torch.testing.assert_close(grad, total_grad / divisor, rtol=2e-5, atol=1e-9)


def test_gradient_accumulation_is_one_big_batch(backend):
    """Two micro-batches with unequal numbers of pairs and num_items of both: the big batch's loss and gradient."""
    big = random_batch(3, B=8)
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])  # chosen 0..3 | rejected 4..7 -> micro-batches of 3 pairs and of 1
    want, want_grad = loss_and_grad(big.logits, big.layout, backend=backend)
    n = want.pairs.num_valid
    total, grad = 0.0, torch.zeros_like(want_grad)
    for rows in (order[:6], order[6:]):
        out, g = loss_and_grad(big.logits[rows], big.labels[rows], big.step_ids[rows], backend=backend, num_items=n)
        total += out.loss.item()
        grad[rows] += g
    assert total == pytest.approx(want.loss.item(), rel=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)


def test_plain_tensors_equal_the_layout(backend):
    batch = random_batch(3, weighted=True)
    layout = batch.layout
    want, want_grad = loss_and_grad(batch.logits, layout, backend=backend)
    for args, kw in [
        ((batch.labels, batch.step_ids), {}),
        ((batch.labels,), {"step_ids": batch.step_ids}),
        ((), {"labels": batch.labels, "step_ids": batch.step_ids}),
        ((batch.labels, batch.step_ids), {"pairs": want.pairs.index}),
    ]:
        got, grad = loss_and_grad(batch.logits, *args, token_weights=batch.token_weights, backend=backend, **kw)
        assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
    got, _ = loss_and_grad(batch.logits, layout, pairs=want.pairs, backend=backend)
    assert torch.equal(got.loss, want.loss)


def test_token_weights_beside_a_layout(backend):
    batch = random_batch(3)
    weights = torch.rand(batch.labels.shape) + 0.1
    want = step_pref_loss(batch.logits, batch.labels, batch.step_ids, token_weights=weights, backend=backend).loss
    layout = batch.layout
    for form in (weights, weights.reshape(-1)[layout.rows + 1]):
        assert torch.equal(step_pref_loss(batch.logits, layout, token_weights=form, backend=backend).loss, want)


def test_per_pair_values_beside_stored_ones():
    batch = random_batch(3)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 4, weights=torch.full((4,), 2.0), margins=torch.full((4,), 0.5))
    bare = StepPairs.from_index(layout, pairs.index)

    def loss(pairs, **kw):
        return step_pref_loss(batch.logits, layout, pairs, backend="reference", **kw).loss

    assert torch.equal(loss(pairs), loss(bare, weights=torch.full((4,), 2.0), margins=torch.full((4,), 0.5)))
    assert torch.equal(loss(pairs, weights=torch.ones(4)), loss(bare, margins=torch.full((4,), 0.5)))
    torch.testing.assert_close(loss(pairs), 2 * loss(pairs, weights=torch.ones(4)))
    # label smoothing is the same soft label for every pair
    torch.testing.assert_close(loss(bare, label_smoothing=0.1), loss(bare, soft_labels=torch.full((4,), 0.9)))


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


# ---- metrics


def test_metrics_by_hand():
    """Probabilities 1/8, 2/8, 5/8 everywhere; beta 0.5, reference sums given; chosen sequence 0, rejected sequence 1.

    step 0: chosen labels 2, 2 -> S = 2 ln(5/8); rejected 0, 1 -> ln(1/8) + ln(2/8). step 1: chosen 0 -> ln(1/8);
    rejected 2 -> ln(5/8).
    step 2: chosen 1 -> ln(2/8); rejected has none: dropped.
    """
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=F64).log().repeat(2, 5, 1)
    labels = torch.tensor([[0, 2, 2, 0, 1], [0, 0, 1, 2, -100]])
    ids = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 0, 1, 2]])
    ref = torch.tensor([-1.0, -2.0, -7.0, -3.0, -0.25, -9.0], dtype=F64)
    out = step_pref_loss(logits, labels, ids, ref=ref, beta=0.5, backend="reference")
    a, b, c = math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)
    w0, w1, l0, l1 = 2 * c, a, a + b, c
    r_w, r_l = [0.5 * (w0 + 1), 0.5 * (w1 + 2)], [0.5 * (l0 + 3), 0.5 * (l1 + 0.25)]
    want = {
        "rewards/chosen": sum(r_w) / 2,
        "rewards/rejected": sum(r_l) / 2,
        "rewards/margins": (sum(r_w) - sum(r_l)) / 2,
        "rewards/accuracies": sum(x > y for x, y in zip(r_w, r_l, strict=True)) / 2,
        "logps/chosen": (w0 + w1) / 2,
        "logps/rejected": (l0 + l1) / 2,
        "steps/logps": (w0 + w1 + b + l0 + l1) / 5,
        "steps/tokens": 7 / 5,
        "steps/count": 5,
        "steps/empty": 1,
        "pairs/count": 2,
        "pairs/dropped": 1,
    }
    got = {k: v.item() for k, v in out.metrics.items()}
    assert got == pytest.approx(want, rel=1e-6)
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in out.metrics.values())
    assert out.rewards.tolist() == pytest.approx(
        [0.5 * (s - r) for s, r in zip([w0, w1, b, l0, l1, 0], ref.tolist(), strict=True)]
    )


def test_rewards_of_per_token_losses():
    """simpo rewards are beta * S / n, as in TRL's CPOTrainer; ipo keeps beta * u, as in TRL's DPOTrainer."""
    batch = random_batch(1, dtype=F64)
    layout = batch.layout
    sums, counts, _ = oracle_steps(batch)
    simpo = step_pref_loss(batch.logits, layout, loss_type="simpo", beta=2.0, backend="reference").rewards
    assert simpo.tolist() == pytest.approx([2.0 * s / max(n, 1) for s, n in zip(sums.tolist(), counts, strict=True)])
    ipo = step_pref_loss(batch.logits, layout, loss_type="ipo", beta=0.3, backend="reference").rewards
    assert ipo.tolist() == pytest.approx((0.3 * sums).tolist())


def test_equal_rewards_are_not_accurate():
    batch = random_batch(1)
    batch.logits[2:] = batch.logits[:2]
    batch.labels[2:], batch.step_ids[2:] = batch.labels[:2], batch.step_ids[:2]
    out = step_pref_loss(batch.logits, batch.layout, backend="reference")
    assert out.metrics["rewards/accuracies"] == 0 and out.metrics["rewards/margins"] == 0
    assert out.loss.item() == pytest.approx(math.log(2))


# ---- the module, the messages


def test_module(backend):
    batch = random_batch(1)
    module = StepPrefLoss(loss_type="ipo", beta=0.2, backend=backend)
    assert "loss_type='ipo'" in repr(module) and "beta=0.2" in repr(module)
    want = step_pref_loss(batch.logits, batch.layout, loss_type="ipo", beta=0.2, backend=backend).loss
    assert torch.equal(module(batch.logits, batch.layout).loss, want)
    assert torch.equal(module(batch.logits, batch.labels, batch.step_ids).loss, want)
    assert torch.equal(module(batch.logits, labels=batch.labels, step_ids=batch.step_ids).loss, want)
    assert torch.equal(module(batch.logits, batch.layout, batch.layout.pair_by_index()).loss, want)
    assert not torch.equal(module(batch.logits, batch.layout, beta=0.7).loss, want)
    with pytest.raises(ValueError, match="loss_type: expected one of"):
        StepPrefLoss("dpo")
    with pytest.raises(TypeError, match="simpo_gamma"):
        StepPrefLoss("sigmoid", simpo_gamma=1.0)


BAD_CALLS = {
    "loss type": ({"loss_type": "dpo"}, ValueError, r"loss_type: expected one of 'sigmoid', .*got 'dpo'"),
    "unknown option": ({"simpo_gamma": 1.0}, TypeError, "simpo_gamma: .*'sigmoid'"),
    "typo": ({"label_smothing": 0.1}, TypeError, "label_smothing"),
    "beta": ({"beta": 0.0}, ValueError, "beta: expected a finite number above 0, got 0.0"),
    "beta infinite": ({"beta": float("inf")}, ValueError, "beta: expected a finite number"),
    "label smoothing": ({"label_smoothing": 0.5}, ValueError, r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
    "label smoothing type": ({"label_smoothing": True}, TypeError, "label_smoothing: expected a number"),
    "smoothing where there is none": ({"label_smoothing": 0.1, "loss_type": "hinge"}, ValueError, "label_smoothing: loss_type 'hinge' does not have it"),
    "soft labels where there are none": ({"soft_labels": torch.ones(4), "loss_type": "ipo"}, ValueError, "soft_labels: loss_type 'ipo' does not have it"),
    "both": ({"soft_labels": torch.ones(4), "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 when soft_labels are given"),
    "reference-free": ({"loss_type": "simpo", "ref": torch.zeros(8)}, ValueError, "ref: loss_type 'simpo' is reference-free"),
    "ref shape": ({"ref": torch.zeros(99)}, ValueError, r"ref: expected step sums \(\d+,\), token log-probs \(\d+,\) or \(4, 12\), or a StepLogps, got"),
    "ref type": ({"ref": [0.0]}, TypeError, "ref: expected a torch.Tensor"),
    "ref dtype": ({"ref": torch.zeros(4, 12).long()}, TypeError, "ref: expected a tensor of float32"),
    "ref device": ({"ref": torch.zeros(4, 12, device="meta")}, ValueError, "ref: expected a tensor on cpu"),
    "reduction": ({"reduction": "none"}, ValueError, "reduction: expected one of 'mean', 'sum', got 'none'"),
    "num_items": ({"num_items": -1}, ValueError, "num_items: expected"),
    "num_items as a tensor": ({"num_items": torch.tensor(-1)}, ValueError, "num_items: expected a finite number, 0 or above, got -1"),
    "num_items shape": ({"num_items": torch.ones(1)}, ValueError, r"num_items: expected shape \(\)"),
    "temperature": ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0"),
    "backend": ({"backend": "numpy"}, ValueError, "backend: expected 'auto' or one of 'cpu', 'triton', .*'reference', got 'numpy'"),
    "token weights": ({"token_weights": torch.ones(3)}, ValueError, "token_weights: expected shape"),
    "pairs": ({"pairs": torch.tensor([[0, 99]])}, ValueError, r"pairs: expected step indices in \[0, \d+\), got 99 in pair 0"),
    "step ids beside a layout": ({"step_ids": torch.zeros(4, 12).long()}, TypeError, "step_ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_messages(case):
    kw, error, match = BAD_CALLS[case]
    batch = random_batch(0)
    if "soft_labels" in kw:
        kw = {**kw, "pairs": random_pairs(batch.layout, 0, 4)}
    with pytest.raises(error, match=match):
        step_pref_loss(batch.logits, batch.layout, **{"backend": "reference", **kw})


def test_messages_about_the_call(batch):
    logits, layout, labels, ids = batch.logits, batch.layout, batch.labels, batch.step_ids
    pairs = layout.pair_by_index()
    with pytest.raises(TypeError, match="step_ids: expected .* beside plain labels, got None"):
        step_pref_loss(logits, labels)
    with pytest.raises(TypeError, match="labels: expected a torch.Tensor"):
        step_pref_loss(logits, labels.tolist(), ids)
    with pytest.raises(TypeError, match="pairs: given twice"):
        step_pref_loss(logits, layout, pairs, pairs=pairs)
    with pytest.raises(TypeError, match="step_ids: given twice"):
        step_pref_loss(logits, labels, ids, step_ids=ids)
    with pytest.raises(ValueError, match=r"logits: expected shape \(4, 12, 11\)"):
        step_pref_loss(logits[:, :-1], layout)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 5\)"):
        step_pref_loss(logits[..., :5].contiguous(), layout)
    with pytest.raises(TypeError, match="logits: expected a tensor of float32, bfloat16, float16, float64"):
        step_pref_loss(logits.long(), layout)
    with pytest.raises(ValueError, match="layout: expected it on meta"):
        step_pref_loss(logits.to("meta"), layout)
    with pytest.raises(ValueError, match="pairs: expected them on cpu"):
        step_pref_loss(logits, layout, pairs.to("meta"))


def test_pairs_of_another_layout_are_refused(batch):
    fewer = Batch(batch.logits[:2], batch.labels[:2], batch.step_ids[:2], None)
    with pytest.raises(ValueError, match="pairs: expected pairs of the layout's"):
        step_pref_loss(batch.logits, batch.layout, fewer.layout.pair_by_index())
    emptied = Batch(batch.logits, batch.labels.clone(), batch.step_ids, None)
    emptied.labels[0] = -100
    with pytest.raises(ValueError, match="pairs: expected pairs made for this layout"):
        step_pref_loss(batch.logits, batch.layout, emptied.layout.pair_by_index())


def test_outputs_are_plain_objects(batch):
    out = step_pref_loss(batch.logits, batch.layout)
    assert out == out and out != step_pref_loss(batch.logits, batch.layout)  # by identity: tensors have no truth value
    assert "loss=" in repr(out) and "layout" not in repr(out)
    assert isinstance(step_logps(batch.logits, batch.layout), StepLogps)
    assert torch.equal(
        step_logps(batch.logits, batch.labels, batch.step_ids).sums, step_logps(batch.logits, batch.layout).sums
    )
