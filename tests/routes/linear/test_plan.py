# SPDX-License-Identifier: Apache-2.0
"""The schedule of the linear route, on layouts small enough to plan by hand.

Mutations of sspo_ext/plan.py, and the test that catches each:
* rows keep the layout's order: test_loose_steps_cost_one_gemm
* pairs with an empty step tie steps together: test_empty_step_ties_nothing_together
* a unit that fills the chunk exactly is recomputed: test_trained_head_three_gemms_when_units_fit
* a chunk is overfilled by one unit: test_rows_are_ordered_by_unit
* the last unit of a chunk is cut short: test_trained_head_three_gemms_when_units_fit
* recompute forgets the buffered chunk: test_unit_one_row_over_the_budget_is_computed_twice
* uneven cuts: test_cuts_are_few_and_even
* a frozen plan keeps loose rows: test_loose_steps_cost_one_gemm
* the budget ignores the dtype; no row at all in a chunk: test_rows_per_chunk
"""

import numpy as np
import pytest
import torch
from helpers.linear import layout_of_lengths, pairs_of

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.routes.linear.budget import rows_per_chunk

V, H = 11, 8


def plan(lengths, pairs, chunk_rows, *, hidden=True, weight=True, bias=False, dtype=torch.float32):
    layout = layout_of_lengths(lengths, V)
    return pref_plan(
        layout,
        pairs_of(layout, *pairs),
        vocab=V,
        hidden=H,
        dtype=dtype,
        chunk_bytes=chunk_rows * V * dtype.itemsize,
        hidden_gradient=hidden,
        weight_gradient=weight,
        bias_gradient=bias,
    )


def shape_of(p):
    """[(kind, steps, sizes of its chunks)], for comparison with a hand-made plan."""
    return [(g.kind, g.steps.tolist(), [e - s for s, e in g.chunks]) for g in p.groups]


def order_of(p):
    return list(range(p.num_rows)) if p.order is None else p.order.tolist()


def gemms(p):
    """GEMMs a row: the FLOPs the plan names over those of one product."""
    return p.flops / (2 * H * V * p.num_rows)


# ---- the four cases of the schedule


def test_without_gradients_one_gemm():
    p = plan([3, 4, 2], [(0, 1)], 4, hidden=False, weight=False)
    assert gemms(p) == 1
    assert sorted(order_of(p)) == list(range(9))
    assert {g.kind for g in p.groups} == {"logps"}


def test_frozen_head_two_gemms():
    p = plan([3, 4], [(0, 1)], 2, weight=False)
    assert gemms(p) == 2 and {g.kind for g in p.groups} == {"frozen"}


def test_trained_head_three_gemms_when_units_fit():
    p = plan([3, 4], [(0, 1)], 7)
    assert shape_of(p) == [("complete", [0, 1], [7])] and gemms(p) == 3


def test_unit_one_row_over_the_budget_is_computed_twice():
    p = plan([3, 4], [(0, 1)], 6)
    assert [g.kind for g in p.groups] == ["recompute"]
    # three for every row and a second look at all but the last chunk, whose logits are still in the buffer
    sizes = shape_of(p)[0][2]
    assert p.flops == 2 * H * V * (3 * 7 + 7 - sizes[-1])


def test_many_chunks_approach_four_gemms():
    p = plan([50, 50], [(0, 1)], 1)
    assert gemms(p) == 4 - 1 / 100


def test_only_the_large_unit_pays_four():
    p = plan([2, 2, 9, 9], [(0, 1), (2, 3)], 6)
    kinds = {g.kind: g for g in p.groups}
    assert set(kinds) == {"complete", "recompute"}
    assert kinds["complete"].end - kinds["complete"].start == 4
    last = kinds["recompute"].chunks[-1]
    assert p.flops // (2 * H * V) == 3 * 4 + 3 * 18 + 18 - (last[1] - last[0])


@pytest.mark.parametrize(
    "needs, count", [((1, 1, 0), 3), ((0, 1, 0), 2), ((1, 0, 1), 2), ((0, 0, 1), 1), ((1, 1, 1), 3), ((0, 1, 1), 2)]
)
def test_gradients_not_asked_for_cost_nothing(needs, count):
    """A bias gradient is a sum and no GEMM."""
    hidden, weight, bias = map(bool, needs)
    assert gemms(plan([3, 4], [(0, 1)], 7, hidden=hidden, weight=weight, bias=bias)) == count


# ---- steps in no pair


@pytest.mark.parametrize("weight", [True, False])
def test_loose_steps_cost_one_gemm(weight):
    """Their log-probs are reported, and nothing flows back."""
    p = plan([3, 5, 4], [(0, 2)], 7, weight=weight)
    assert p.flops // (2 * H * V) == 5 + (3 if weight else 2) * 7
    loose = [g for g in p.groups if g.kind == "logps"]
    assert [g.steps.tolist() for g in loose] == [[1]]
    assert order_of(p)[loose[0].start : loose[0].end] == [3, 4, 5, 6, 7]


def test_no_pairs_at_all():
    p = plan([3, 5], [], 4)
    assert gemms(p) == 1 and {g.kind for g in p.groups} == {"logps"}


def test_empty_step_ties_nothing_together():
    """Pairs (0, 1) and (1, 2) share step 1, which is empty: both are no part of the loss."""
    p = plan([3, 0, 4], [(0, 1), (1, 2)], 4)
    assert {g.kind for g in p.groups} == {"logps"} and p.flops // (2 * H * V) == 7
    p = plan([3, 0, 4, 2], [(0, 1), (1, 2), (0, 3)], 5)
    complete = [g for g in p.groups if g.kind == "complete"]
    assert [g.steps.tolist() for g in complete] == [[0, 3]] and [g.pairs.tolist() for g in complete] == [[2]]


# ---- units and chunks


def test_pairs_that_share_a_step_are_one_unit():
    p = plan([2, 2, 2, 2], [(0, 1), (2, 1), (2, 3)], 8)
    assert shape_of(p) == [("complete", [0, 1, 2, 3], [8])]
    assert p.groups[0].pairs.tolist() == [0, 1, 2]
    assert plan([2, 2, 2, 2], [(0, 1), (2, 1), (2, 3)], 7).groups[0].kind == "recompute"


def test_rows_are_ordered_by_unit():
    p = plan([1, 2, 3, 2], [(0, 2), (3, 1)], 4)
    assert shape_of(p) == [("complete", [0, 2], [4]), ("complete", [1, 3], [4])]
    assert order_of(p) == [0, 3, 4, 5, 1, 2, 6, 7]
    assert [g.pairs.tolist() for g in p.groups] == [[0], [1]]


def test_whole_units_share_a_chunk():
    """Units of 2, 2, 2 and 4 rows, at most 5 a chunk: the third would split."""
    p = plan([1] * 6 + [2, 2], [(0, 1), (2, 3), (4, 5), (6, 7)], 5)
    assert [(k, c) for k, _, c in shape_of(p)] == [("complete", [4]), ("complete", [2]), ("complete", [4])]
    assert gemms(p) == 3


def test_a_unit_that_fills_the_chunk_exactly():
    assert [k for k, *_ in shape_of(plan([2, 2, 2, 2], [(0, 1), (2, 3)], 4))] == ["complete", "complete"]
    assert [c for *_, c in shape_of(plan([2, 2, 2, 2], [(0, 1), (2, 3)], 8))] == [[8]]


@pytest.mark.parametrize("rows, size", [(10, 4), (9, 4), (8, 4), (7, 7), (1, 3), (100, 7), (5, 1)])
def test_cuts_are_few_and_even(rows, size):
    p = plan([rows], [], size, hidden=False, weight=False)
    sizes = [c for g in shape_of(p) for c in g[2]]
    assert sum(sizes) == rows and len(sizes) == -(-rows // size)
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size


# ---- the budget


def test_rows_per_chunk():
    f32, bf16 = torch.float32, torch.bfloat16
    assert rows_per_chunk(100, f32, 4000, "cpu") == 10
    assert rows_per_chunk(100, f32, 3999, "cpu") == 9
    assert rows_per_chunk(100, bf16, 4000, "cpu") == 20
    assert rows_per_chunk(100, torch.float64, 4000, "cpu") == 5
    assert rows_per_chunk(128256, f32, 1, "cpu") == 1, "one row, however small the budget"
    assert rows_per_chunk(0, f32, 4000, "cpu") >= 1
    for device in ("cpu", "cuda"):
        rows = rows_per_chunk(128256, bf16, None, device)
        assert 64 <= rows and rows * 128256 * 2 <= 512 << 20, "the default feeds a GEMM and stays below a GB"


def test_buffer_bytes():
    assert plan([3, 4], [(0, 1)], 5).buffer_bytes == 5 * V * 4
    assert plan([3, 4], [(0, 1)], 50).buffer_bytes == 7 * V * 4, "no larger than the rows there are"
    assert plan([3, 4], [(0, 1)], 5, dtype=torch.bfloat16).buffer_bytes == 5 * V * 2


def test_step_logps_of_a_trained_head():
    """Gradients of single steps, known only in backward."""
    layout = layout_of_lengths([3, 4], V)
    for hidden, weight, count in ((True, True, 4), (False, True, 3), (True, False, 2), (False, False, 1)):
        assert (
            gemms(pref_plan(layout, logps_only=True, vocab=V, hidden=H, hidden_gradient=hidden, weight_gradient=weight))
            == count
        )


# ---- the object


def test_prints_what_it_will_do():
    text = str(plan([3, 4, 20, 20, 6], [(0, 1), (2, 3)], 10))
    for part in (
        "53 rows",
        f"H {H}",
        f"V {V}",
        "float32",
        "complete: 7 rows in 1 chunk;",
        "recompute: 40 rows in 4 chunks",
        "logps: 6 rows",
        "GEMMs a row",
        "GFLOP",
        "MiB",
    ):
        assert part.rstrip(";") in text, (part, text)


def test_nothing_scored():
    layout = StepLayout.from_step_ids(torch.full((2, 5), -100), torch.full((2, 5), -1))
    for weight in (True, False):
        p = pref_plan(layout, vocab=V, hidden=H, weight_gradient=weight)
        assert p.flops == 0 and "0 rows" in str(p)
    assert plan([0, 0], [(0, 1)], 4).flops == 0


def test_every_row_once_and_every_live_pair_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        steps = int(rng.integers(2, 12))
        lengths = rng.integers(0, 6, steps).tolist()
        pairs = [tuple(rng.choice(steps, 2, replace=False).tolist()) for _ in range(int(rng.integers(0, 8)))]
        chunk = int(rng.integers(1, 12))
        for weight in (True, False):
            p = plan(lengths, pairs, chunk, weight=weight)
            assert sorted(order_of(p)) == list(range(sum(lengths)))
            at = 0
            for g in p.groups:
                assert g.start == at and [
                    c for pair in zip(g.chunks[:-1], g.chunks[1:], strict=True) for c in (pair[0][1] - pair[1][0],)
                ] == [0] * (len(g.chunks) - 1)
                assert all(0 < e - s <= chunk for s, e in g.chunks)
                assert sum(e - s for s, e in g.chunks) == g.end - g.start == sum(lengths[k] for k in g.steps)
                assert all(set(pairs[q]) <= set(g.steps.tolist()) for q in g.pairs)
                at = g.end
            assert at == sum(lengths)
            live = [q for q, (w, loser) in enumerate(pairs) if lengths[w] and lengths[loser]]
            held = sorted(q for g in p.groups for q in g.pairs.tolist() if q in live)
            assert held == live


def test_pairs_by_index_are_the_default():
    """As for the loss itself."""
    layout = StepLayout.from_step_ids(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    default, given = pref_plan(layout, vocab=V, hidden=H), pref_plan(layout, layout.pair_by_index(), vocab=V, hidden=H)
    assert shape_of(default) == shape_of(given) and default.flops == given.flops
