# SPDX-License-Identifier: Apache-2.0
"""What enters the linear route and what comes back: chunks, masks, weights, layouts, strides, tied embeddings.

Mutation of sspo_ext/routes/linear, and the test that catches it:
* step sums or pair losses not put back in order: test_equals_the_logits_route
"""

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.linear import (
    layout_of_lengths,
    pairs_of,
    problem,
    truth_of,
)
from helpers.linear_route import F32, F64, SHAPE, H, V, assert_rule, assert_same, budget, linear_route, units_batch

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_chunk_budget_changes_nothing(needs):
    layout, pairs, options = units_batch(seed=4)
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    want = linear_route(p, layout, pairs, needs=needs, **options)
    for rows in (1, 2, 3, 5, 8, 13, 21):
        assert_same(linear_route(p, layout, pairs, needs=needs, rows=rows, **options), want, 1e-12)


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1), (1, 0, 1)])
def test_unscored_rows_are_not_touched(needs):
    """NaN in every prompt, padding, ignored and zero-weight position: nothing of it comes back, and those rows get
    exactly 0."""
    layout, pairs, options = units_batch(seed=5)
    p = problem(SHAPE, V, H)
    clean = linear_route(p, layout, pairs, needs=needs, rows=6, **options)
    unscored = (layout.row_of < 0).reshape(SHAPE)
    assert unscored.sum() > 5
    p.hidden[unscored] = float("nan")
    got = linear_route(p, layout, pairs, needs=needs, rows=6, **options)
    for a, b in zip(got, clean, strict=True):
        assert a is None or torch.equal(a, b)
    assert torch.count_nonzero(got[1][unscored]) == 0 and got[1][~unscored].abs().sum() > 0


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_step_in_no_pair(needs):
    """Its log-prob is reported; its rows get exactly 0, whatever is in them (the logits route does the same)."""
    layout = layout_of_lengths([3, 4, 2, 3], V)
    pairs = pairs_of(layout, (3, 0))
    p = problem((1, layout.shape[1]), V, H)
    clean = linear_route(p, layout, pairs, needs=needs)
    sums = step_logps(torch.nn.functional.linear(p.hidden, p.weight, p.bias), layout).sums
    out = linear_step_pref_loss(p.hidden, p.weight, layout, pairs, bias=p.bias)
    torch.testing.assert_close(out.step_logps, sums)
    assert torch.count_nonzero(clean[1][0, 3:9]) == 0 and (clean[1][0, :3].abs().sum(-1) > 0).all()
    p.hidden[0, 4] = float("nan")
    for rows in (10_000, 3):
        got = linear_route(p, layout, pairs, needs=needs, rows=rows)
        assert torch.isfinite(got[0]) and torch.count_nonzero(got[1][0, 3:9]) == 0
        assert all(g is None or torch.isfinite(g).all() for g in got)


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_non_finite_values_propagate(needs):
    layout = layout_of_lengths([3, 4], V)
    p = problem((1, layout.shape[1]), V, H)
    p.hidden[0, 4] = float("nan")
    got = linear_route(p, layout, pairs_of(layout, (0, 1)), needs=needs)
    assert got[0].isnan() and got[1].isnan().any()


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_masked_vocabulary(needs):
    """A bias of -inf removes a token (padded vocabularies): as if its row of the head were not there."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    wide = problem(SHAPE, V + 5, H)
    wide.hidden = p.hidden
    wide.weight = torch.cat([p.weight, wide.weight[V:]])
    wide.bias = torch.cat([p.bias, torch.full((5,), float("-inf"))])
    want, got = (linear_route(x, layout, pairs, needs=needs, rows=7, **options) for x in (p, wide))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    if needs[1]:
        torch.testing.assert_close(got[2][:V], want[2])
        assert torch.count_nonzero(got[2][V:]) == 0 and torch.count_nonzero(got[3][V:]) == 0


def test_token_weights():
    """At the layout, or (N,) or (B, T) beside it."""
    batch = random_batch(6, *SHAPE, V=V)
    layout = batch.layout
    pairs = random_pairs(layout, 6)
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(SHAPE, generator=g) + 0.5
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    at_layout = StepLayout.from_step_ids(batch.labels, batch.step_ids, token_weights=weights)
    want = truth_of(p, at_layout, StepPairs.from_index(at_layout, pairs.host_index))
    for given in (weights, weights.reshape(-1)[layout.rows + 1]):
        for rows in (10_000, 4):
            assert_same(linear_route(p, layout, pairs, rows=rows, token_weights=given), want, 1e-7)
    assert_rule(problem(SHAPE, V, H), at_layout, StepPairs.from_index(at_layout, pairs.host_index), rows=5)


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_equals_the_logits_route(needs):
    """Loss, step log-probs, pair losses, metrics and gradients of step_pref_loss on the same kernels."""
    layout, pairs, options = units_batch(seed=7)
    p = problem(SHAPE, V, H)
    leaves, twins = p.leaves(needs), p.leaves(needs)
    got = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=budget(6, F32), **options)
    want = step_pref_loss(torch.nn.functional.linear(*twins), layout, pairs, **options)
    got.loss.backward()
    want.loss.backward()
    for name in ("loss", "step_logps", "pair_losses"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-5, atol=1e-6)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=2e-5, atol=1e-5, msg=name)
    for a, b in zip(leaves, twins, strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=1e-6)


def test_pairs_by_index_are_the_default():
    batch = random_batch(8, *SHAPE, V=V)
    p = problem(SHAPE, V, H)
    got = linear_step_pref_loss(p.hidden, p.weight, batch.layout)
    want = linear_step_pref_loss(p.hidden, p.weight, batch.layout, batch.layout.pair_by_index())
    assert got.loss == want.loss and got.pairs.num_pairs == want.pairs.num_pairs > 0


def test_packed_batch():
    """(total, H) and (1, total, H), steps of several sequences."""
    labels = torch.randint(0, V, (20,), generator=torch.Generator().manual_seed(0))
    layout = StepLayout.from_offsets(
        labels, torch.tensor([0, 8, 20]), torch.tensor([[2, 5], [5, 8], [10, 14], [14, 20]])
    )
    pairs = StepPairs.from_index(layout, torch.tensor([[0, 2], [3, 1]]))
    p = problem((20,), V, H, hidden_dtype=F64, weight_dtype=F64)
    want = truth_of(p, layout, pairs)
    assert_same(linear_route(p, layout, pairs, rows=4), want)
    p.hidden = p.hidden[None]
    got = linear_route(p, layout, pairs, rows=4)
    assert_same([got[0], got[1][0], *got[2:]], want)


def test_strides():
    """A slice of longer hidden states, a transposed head."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    want = linear_route(p, layout, pairs, **options)
    longer = torch.zeros(SHAPE[0], SHAPE[1] + 3, 2 * H, dtype=F64)
    longer[:, : SHAPE[1], ::2] = p.hidden
    longer.requires_grad_()
    transposed = p.weight.t().contiguous().requires_grad_()
    loss = linear_step_pref_loss(
        longer[:, : SHAPE[1], ::2], transposed.t(), layout, pairs, bias=p.bias, chunk_bytes=budget(5, F64), **options
    ).loss
    loss.backward()
    assert_same([loss.detach(), longer.grad[:, : SHAPE[1], ::2], transposed.grad.t(), want[3]], want)
    assert torch.count_nonzero(longer.grad[:, SHAPE[1] :]) == 0


def test_tied_embeddings():
    """One tensor looks the tokens up and predicts them: both gradients arrive."""
    layout, pairs, options = units_batch()
    ids = torch.randint(0, V, SHAPE, generator=torch.Generator().manual_seed(3))
    start = problem(SHAPE, V, H, bias=False, hidden_dtype=F64, weight_dtype=F64).weight
    mix = torch.randn(H, H, dtype=F64, generator=torch.Generator().manual_seed(4))

    def gradient(linear):
        table = start.clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table) @ mix)
        if linear:
            loss = linear_step_pref_loss(hidden, table, layout, pairs, chunk_bytes=budget(5, F64), **options).loss
        else:
            loss = step_pref_loss(hidden @ table.t(), layout, pairs, backend="reference", **options).loss
        loss.backward()
        return table.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_same_bits_every_run(needs):
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    first, second = (linear_route(p, layout, pairs, needs=needs, rows=4, **options) for _ in range(2))
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
