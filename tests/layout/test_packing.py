# SPDX-License-Identifier: Apache-2.0
"""Whole units into few chunks, chunks that grow to the largest unit, and plans that are made once.

Mutations, and the test that catches each: next-fit alone (test_fewer_chunks_than_in_order); a bin overfilled
(test_packing_is_a_packing); a host tensor known by its id (test_a_layout_written_in_place_is_another);
growth under an explicit budget, or without a limit (test_a_chunk_grows_to_the_largest_unit).
"""

import math
import types

import pytest
import torch
from helpers.linear import layout_of_lengths, pairs_of, problem
from helpers.linear_route import BF16, F32, F64, budget, linear_route
from hypothesis import given
from hypothesis import strategies as st

from sspo_ext.layout.packing import packed
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import policy_plan, pref_plan
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.routes.linear import cache, ops, policy

V, H = 11, 8


def test_fewer_chunks_than_in_order():
    """Nine chunks in order, five that are full."""
    sizes = [2, 9, 3, 8, 4, 7, 6, 10, 1]  # no two neighbours fit in 10
    assert len(packed(sizes, 10)) == 5
    layout = layout_of_lengths([n for size in sizes for n in (size - size // 2, size // 2)], V)
    pairs = pairs_of(layout, *((2 * k, 2 * k + 1) for k in range(len(sizes)) if sizes[k] > 1))
    plan = pref_plan(layout, pairs, vocab=V, hidden=H, chunk_bytes=budget(10, F32, V))
    assert plan.weight_chunks == 5 and {group.kind for group in plan.groups} == {"complete", "logps"}


def test_what_is_full_in_order_stays_in_order():
    assert packed([4, 6, 5, 5], 10) == [[0, 1], [2, 3]]
    assert packed([], 10) == []


@given(st.lists(st.integers(1, 20), max_size=40))
def test_packing_is_a_packing(sizes):
    bins = packed(sizes, 20)
    assert sorted(place for places in bins for place in places) == list(range(len(sizes)))
    assert all(0 < sum(sizes[place] for place in places) <= 20 for places in bins)
    assert all(places == sorted(places) for places in bins)
    assert len(bins) <= 2 * math.ceil(sum(sizes) / 20), "two neighbours in order fill more than one"


def test_order_of_chunks_does_not_change_the_loss():
    sizes = [6, 5, 5, 4, 6, 4, 7, 3]
    layout = layout_of_lengths([n for size in sizes for n in (size - 2, 2)], V)
    pairs = pairs_of(layout, *((2 * k, 2 * k + 1) for k in range(len(sizes))))
    p = problem(layout.shape, V, H, hidden_dtype=F64, weight_dtype=F64)
    for got, want in zip(
        linear_route(p, layout, pairs, rows=10), linear_route(p, layout, pairs, rows=1000), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1200, 4000])
def test_a_chunk_grows_to_the_largest_unit(monkeypatch, tokens):
    """DPO on an 80 GB card: three GEMMs a row for responses of 1,200 to 4,000 tokens, whatever else is small."""
    card = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    layout = layout_of_lengths([tokens, tokens, *[30, 40] * 150], 151936)
    pairs = pairs_of(layout, *((k, k + 1) for k in range(0, 302, 2)))
    monkeypatch.setattr(type(layout), "device", property(lambda self: torch.device("cuda")))
    plan = pref_plan(layout, pairs, vocab=151936, hidden=4096, dtype=BF16)
    assert {group.kind for group in plan.groups} == {"complete"} and plan.gemm_rows == 3 * plan.num_rows
    assert plan.chunk_rows == max(2 * tokens, (512 << 20) // (151936 * 2))
    fixed = pref_plan(layout, pairs, vocab=151936, hidden=4096, dtype=BF16, chunk_bytes=512 << 20)
    assert fixed.chunk_rows == (512 << 20) // (151936 * 2), "a budget that is given is kept"
    card.total_memory = 16 * 10**9
    small = pref_plan(layout, pairs, vocab=151936, hidden=4096, dtype=BF16)
    assert small.buffer_bytes <= 10**9


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_one_chunk_instead_of_a_sum(dtype):
    """A batch whose logits are not larger than budget and float32 sum together is one chunk, which needs no sum."""
    vocab, hidden, budget_rows = 2**18, 512, (128 << 20) // (2**18 * dtype.itemsize)
    extra = 2 * hidden if dtype == BF16 else 0
    for rows, chunks in ((budget_rows + extra, 1), (budget_rows + extra + 2, 2)):
        layout = layout_of_lengths([1] * rows, vocab)
        pairs = pairs_of(layout, *((k, k + 1) for k in range(0, rows, 2)))
        plan = pref_plan(layout, pairs, vocab=vocab, hidden=hidden, dtype=dtype)
        assert (plan.weight_chunks == 1) == (chunks == 1)
        assert plan.buffer_bytes + plan.accumulator_bytes <= (128 << 20) + 4 * vocab * hidden
        assert (plan.accumulator_bytes > 0) == (chunks > 1 and dtype == BF16)


def test_rows_that_are_units_of_their_own_do_not_grow_a_chunk(monkeypatch):
    """Token-level policy losses compute no row twice, so more than one chunk of the budget gains nothing."""
    card = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    layout = layout_of_lengths([4096] * 4, 151936)
    monkeypatch.setattr(type(layout), "device", property(lambda self: torch.device("cuda")))
    sizes = {"vocab": 151936, "hidden": 4096, "dtype": BF16}
    alone = policy_plan(layout, weight_gradient=False, bias_gradient=True, **sizes)
    assert alone.buffer_bytes <= 512 << 20
    trained = policy_plan(layout, **sizes)
    assert trained.buffer_bytes + trained.accumulator_bytes <= (512 << 20) + 4 * 151936 * 4096


@pytest.mark.parametrize("wide", ["weight", "buffer"])
def test_a_float32_gradient_is_summed_where_it_is_delivered(wide, made):
    """One chunk saves no sum there, and would round the gradient to 16 bits: rows above the budget are cut."""
    vocab, hidden = 2**16, 64
    rows = (128 << 20) // (vocab * 2) + 2
    layout = layout_of_lengths([1] * rows, vocab)
    pairs = pairs_of(layout, *((k, k + 1) for k in range(0, rows, 2)))
    weight = torch.zeros(vocab, hidden, dtype=F32 if wide == "weight" else BF16, requires_grad=True)
    states = torch.zeros(*layout.shape, hidden, dtype=BF16, requires_grad=True)
    buffer = torch.zeros(vocab, hidden) if wide == "buffer" else None
    with torch.autocast("cpu", BF16, enabled=wide == "weight"), torch.no_grad():
        linear_step_pref_loss(states, weight, layout, pairs, reference_free=True)
    call = made.pop()
    assert call.weight_chunks == 0  # nothing to plan without gradients
    with torch.autocast("cpu", BF16, enabled=wide == "weight"):
        linear_step_pref_loss(states, weight, layout, pairs, weight_grad=buffer, reference_free=True)
    assert made.pop().weight_chunks == 2


@pytest.fixture
def made(monkeypatch):
    """The plans that were made, in a list."""
    plans = []
    for module, name in ((ops, "make_plan"), (policy, "make_policy_plan")):
        make = getattr(module, name)

        def recorded(*args, make=make, **kwargs):
            plans.append(make(*args, **kwargs))
            return plans[-1]

        monkeypatch.setattr(module, name, recorded)
    return plans


def test_default_pairs_need_no_new_plan(made):
    layout = StepLayout.from_step_ids(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[-1, 0, 0, 1, 1]] * 2))
    p = problem(layout.shape, V, H)
    for _ in range(3):
        linear_step_pref_loss(*p.leaves()[:2], layout, reference_free=True).loss.backward()
    assert len(made) == 1


def test_a_plan_is_made_once(made):
    layout = layout_of_lengths([3, 4, 2, 5], V)
    pairs = pairs_of(layout, (0, 1), (2, 3))
    p = problem(layout.shape, V, H)

    def run(layout, pairs, **options):
        linear_step_pref_loss(*p.leaves()[:2], layout, pairs, reference_free=True, **options).loss.backward()

    run(layout, pairs)
    run(layout, pairs)
    assert len(made) == 1
    run(layout, pairs_of(layout, (1, 0), (2, 3)))
    run(layout, pairs, chunk_bytes=budget(7, F32, V))
    assert len(made) == 3
    run(layout_of_lengths([3, 4, 2, 5], V), pairs_of(layout, (0, 1), (2, 3)))
    assert len(made) == 4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_policy_plan_is_made_once(made, level):
    layout = layout_of_lengths([3, 4, 2, 5], V)
    p = problem(layout.shape, V, H)
    for _ in range(2):
        options = {"loss_type": "ppo", "importance_sampling_level": level}
        out = linear_step_policy_loss(*p.leaves()[:2], layout, torch.ones(4), **options)
        out.loss.backward()
    assert len(made) == 1


def test_a_layout_written_in_place_is_another():
    """Plans are looked up by what the host tensors hold, whoever wrote it."""
    offsets, pairs = torch.tensor([0, 3, 7]), torch.tensor([[0, 1]])
    calls = []

    def make():
        calls.append((offsets.tolist(), pairs.tolist()))
        return calls[-1]

    assert cache.cached_plan(make, offsets, pairs, 1) is cache.cached_plan(make, offsets, pairs.clone(), 1)
    offsets[2] = 6
    assert cache.cached_plan(make, offsets, pairs, 1)[0] == [0, 3, 6]
    pairs.numpy()[0] = 1, 0
    assert cache.cached_plan(make, offsets, pairs, 1)[1] == [[1, 0]]
    cache.cached_plan(make, offsets, None, 1), cache.cached_plan(make, offsets, pairs, 2)
    assert len(calls) == 5


def test_tables_are_not_copied_into_a_graph(monkeypatch):
    """A replay would read the host's memory again, which is gone: what an eager run kept is used, or it is said."""
    plan, device = types.SimpleNamespace(on_device={}), torch.device("cuda", 0)
    capturing = types.SimpleNamespace(now=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.now)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=3))
    with pytest.raises(RuntimeError, match="run this call once before it is captured"):
        cache.kept_on_device(plan, "order", device, lambda: "tables")
    capturing.now = False
    assert cache.kept_on_device(plan, "order", device, lambda: "tables") == "tables"
    capturing.now = True
    assert cache.kept_on_device(plan, "order", device, lambda: "others") == "tables"


def test_few_plans_of_a_layout_are_kept():
    offsets = torch.tensor([0, 3, 7])
    for number in range(50):
        cache.cached_plan(lambda number=number: number, offsets, None, number)
    assert len(cache._PLANS[offsets]) == cache._MOST_PLANS
