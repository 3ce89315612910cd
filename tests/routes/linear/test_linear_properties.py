# SPDX-License-Identifier: Apache-2.0
"""Properties of the linear route over random layouts, pairs and chunk budgets.

Mutations of sspo_ext/linear_engine.py, and the test that catches each:
* winner and loser exchanged: test_equals_the_reference
"""

from dataclasses import replace

import torch
from helpers.linear import Problem, collect, logits_route, pairs_of, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss

F64 = torch.float64
FEW = settings(max_examples=40, deadline=None, derandomize=True)
V, H = 7, 3


@st.composite
def cases(draw):
    """A packed batch: sequences of steps (some empty) behind prompts, pairs that share steps, weights, a chunk
    budget in rows."""
    sequences = draw(
        st.lists(
            st.tuples(st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=4)), min_size=1, max_size=4
        )
    )
    spans, cu = [], [0]
    for prompt, steps in sequences:
        at = cu[-1] + prompt
        for length in steps:
            spans.append((at, at + length))
            at += length
        cu.append(at)
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (cu[-1],), generator=g)
    labels[torch.rand(cu[-1], generator=g) < 0.1] = -100
    weights = torch.rand(cu[-1], generator=g) + 0.1 if draw(st.booleans()) else None
    layout = StepLayout.from_offsets(labels, torch.tensor(cu), torch.tensor(spans), token_weights=weights)
    S = len(spans)
    step = st.integers(0, S - 1)
    index = draw(st.lists(st.tuples(step, step).filter(lambda p: p[0] != p[1]), max_size=6)) if S > 1 else []
    pairs = pairs_of(layout, *index, weights=torch.rand(len(index), generator=g) if draw(st.booleans()) else None)
    needs = draw(st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 0, 1), (0, 0, 0)]))
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 9, 1000]))
    p = problem((cu[-1],), V, H, seed=seed, hidden_dtype=F64, weight_dtype=F64)
    # as many rows as steps: a reference of that length could be either
    ref = torch.randn(S, generator=g, dtype=F64) if draw(st.booleans()) and layout.num_rows != S else None
    return layout, pairs, p, needs, rows, ref


def route(p, layout, pairs, needs, rows, **options):
    leaves = p.leaves(needs)
    out = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=rows * V * 8, **options)
    return out, collect(out.loss, leaves)


def assert_equal(got, want, rel=1e-9):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rel, atol=1e-12)


@FEW
@given(cases())
def test_equals_the_reference(case):
    layout, pairs, p, needs, rows, ref = case
    out, got = route(p, layout, pairs, needs, rows, ref=ref)
    assert_equal(got, logits_route(p, layout, pairs, dtype=F64, needs=needs, ref=ref))
    # what comes with the loss is in the layout's and the pairs' order, whatever order rows were worked on
    frozen, _ = route(p, layout, pairs, (0, 0, 0), 1000, ref=ref)
    torch.testing.assert_close(out.step_logps, frozen.step_logps, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.pair_losses, frozen.pair_losses, rtol=1e-9, atol=1e-12)


@FEW
@given(cases(), st.integers(0, 100))
def test_order_of_sequences_changes_nothing(case, seed):
    """Hidden states permuted with their rows: sums follow, the loss stays."""
    layout, pairs, p, needs, rows, ref = case
    perm = torch.randperm(p.hidden.shape[0], generator=torch.Generator().manual_seed(seed))
    where = torch.argsort(perm)
    moved = replace(layout, rows=where[layout.rows])
    _, want = route(p, layout, pairs, needs, rows, ref=ref)
    _, got = route(Problem(p.hidden[perm], p.weight, p.bias), moved, pairs, needs, rows, ref=ref)
    if got[1] is not None:
        got[1] = got[1][where]
    assert_equal(got, want)


@FEW
@given(cases(), st.floats(-50, 50))
def test_constant_added_to_the_bias(case, constant):
    """A softmax does not see it; the bias's gradient sums to 0 for the same reason."""
    layout, pairs, p, needs, rows, ref = case
    _, want = route(p, layout, pairs, needs, rows, ref=ref)
    _, got = route(Problem(p.hidden, p.weight, p.bias + constant), layout, pairs, needs, rows, ref=ref)
    assert_equal(got, want, rel=1e-7)
    if got[3] is not None:
        assert abs(got[3].sum()) < 1e-9


@FEW
@given(cases())
def test_loss_is_additive_over_pairs(case):
    """Sum reduction: the gradients of all pairs are the sum of those of each alone."""
    layout, pairs, p, needs, rows, ref = case
    weights = pairs.weights if pairs.weights is not None else torch.ones(pairs.num_pairs)
    _, whole = route(p, layout, pairs, needs, rows, ref=ref, reduction="sum")
    total = [None if t is None else torch.zeros_like(t) for t in whole]
    for q in range(pairs.num_pairs):
        one = StepPairs.from_index(layout, pairs.host_index[q : q + 1], weights=weights[q : q + 1])
        for t, part in zip(total, route(p, layout, one, needs, rows, ref=ref, reduction="sum")[1], strict=True):
            if t is not None:
                t += part
    assert_equal(whole, total)


@FEW
@given(cases(), st.floats(-3, 3))
def test_upstream_gradient_is_a_factor(case, upstream):
    layout, pairs, p, needs, rows, ref = case
    _, want = route(p, layout, pairs, needs, rows, ref=ref)
    leaves = p.leaves(needs)
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=rows * V * 8, ref=ref).loss
    got = collect(loss, leaves, upstream)
    assert_equal(got[1:], [None if t is None else t * upstream for t in want[1:]])


@FEW
@given(cases())
def test_sums_and_their_gradient(case):
    """linear_step_logps: sums over steps are the sums of weighted tokens, and d sum_k S_k / d hidden is that of
    the sequence."""
    layout, _, p, needs, rows, _ = case
    leaves = p.leaves(needs)
    out = linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=rows * V * 8)
    weights = torch.ones(layout.num_rows, dtype=F64) if layout.weights is None else layout.weights.double()
    logp = torch.log_softmax(torch.nn.functional.linear(p.hidden, p.weight, p.bias), -1)
    tokens = logp[layout.rows].gather(1, layout.labels[:, None])[:, 0]
    torch.testing.assert_close(out.tokens, tokens, rtol=1e-9, atol=1e-12)
    want = torch.stack(
        [
            (weights * tokens)[s:e].sum()
            for s, e in zip(layout.host_step_offsets[:-1], layout.host_step_offsets[1:], strict=True)
        ]
    )
    torch.testing.assert_close(out.sums, want, rtol=1e-9, atol=1e-12)
    if any(needs):
        twins = p.leaves(needs)
        truth = torch.log_softmax(torch.nn.functional.linear(*twins), -1)[layout.rows].gather(
            1, layout.labels[:, None]
        )[:, 0]
        assert_equal(collect(out.sums.sum(), leaves)[1:], collect((weights * truth).sum(), twins)[1:])
