# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss: every form of its arguments, normalisers, and batches with nothing to score.

Mutations, each caught by the test named (on a copy of the package):
  num_items ignored beside reduction       test_normalisers
  num_items 0 gives inf                    test_nothing_to_score
  ref from a StepLogps by its sums         test_ref_is_weighted_as_the_loss_is
  ref (B, T) not shifted                   test_ref_in_every_form
  ref by token unweighted                  test_ref_in_every_form
  ref summed by index_add in float32       test_ref_is_summed_as_well_as_the_policy
  a dropped pair's weight kept             test_a_dropped_pairs_weight_is_never_read
  metrics average over dropped pairs       test_dropped_pairs_are_not_in_the_mean
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import pytest
import torch
from helpers.batch import Batch, pack, random_batch, random_pairs
from helpers.pref import F64, LOSSES, loss_and_grad

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss


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
