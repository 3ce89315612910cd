# SPDX-License-Identifier: Apache-2.0
"""Peak memory beyond the inputs is the chunk budget and the gradients asked for, at any sequence length: measured
at the allocator.

Sizes are such that every copy of (N, H), (V, H) or of a chunk shows: each is several times the slack.

Mutations of sspo_ext/{routes}, and the test that catches each:
* a second copy of the weight gradient; a buffer or gathered hidden states of all rows: test_budget_and_gradients
* bias summed at once, a 16-bit weight gradient at once: test_budget_and_gradients_bfloat16
* kept gradient scaled beside itself: test_upstream_gradient_makes_no_copy
* grad mode not looked at: test_no_grad_allocates_no_gradient
"""

import pytest
import torch
from helpers.linear import memory, peak_bytes, problem

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.routes import shared
from sspo_ext.routes.linear import products

V, H, ROWS = 3000, 96, 256
NEEDS = {
    "none": (0, 0, 0),
    "frozen": (1, 0, 0),
    "trained": (1, 1, 0),
    "weight": (0, 1, 0),
    "bias": (0, 0, 1),
    "all": (1, 1, 1),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Work on a matrix in blocks of a few MiB is no part of the budget; at these sizes a block would be the whole
    matrix. One thread, because oneDNN packs an operand for each."""
    monkeypatch.setattr(products, "_BLOCK_BYTES", 1 << 15)
    monkeypatch.setattr(shared, "_BLOCK_ELEMENTS", 1 << 13)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(tokens, step=64):
    """Two sequences, half of each a prompt, steps of 64 tokens paired by index."""
    ids = (torch.arange(tokens // 2) - tokens // 4).div(step, rounding_mode="floor").clamp(min=-1)
    labels = torch.randint(0, V, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    layout = StepLayout.from_step_ids(labels, ids.expand(2, -1).contiguous())
    return layout, layout.pair_by_index()


def measure(tokens, needs, dtype, *, fn=None, step=64, H=H, upstream=1.0, **options):
    """(peak, bytes of the logits budget, bytes of the gradients asked for, layout)."""
    layout, pairs = batch(tokens, step)
    p = problem(layout.shape, V, H, hidden_dtype=dtype, weight_dtype=dtype)
    chunk_bytes = ROWS * V * dtype.itemsize

    def run():
        leaves = run.leaves
        if fn is None:
            loss = linear_step_pref_loss(
                *leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=chunk_bytes, **options
            ).loss
        else:
            loss = fn(*leaves[:2], layout, bias=leaves[2], chunk_bytes=chunk_bytes, **options).sums.sum()
        if loss.requires_grad:
            (loss * upstream).backward()

    run.leaves = p.leaves(needs)
    asked = sum(t.numel() * t.element_size() for t in run.leaves if t.requires_grad)
    peak = peak_bytes(run)
    assert all(t.grad is not None for t in run.leaves if t.requires_grad)
    return peak, chunk_bytes, asked, layout


def slack(layout, dtype, H=H):
    """Hidden states and gradient of one chunk, some 100 bytes a row (labels, weights, log-probs, offsets),
    oneDNN's packing."""
    packing = 800_000 if dtype.itemsize == 2 else 0
    return 2 * ROWS * H * dtype.itemsize + 100 * layout.num_rows + 200_000 + packing


def test_the_profiler_sees_temporaries():
    x = torch.zeros(1000, 100)
    assert peak_bytes(lambda: x + x) == 400_000
    assert peak_bytes(lambda: (x + x).sum()) >= 400_000
    assert peak_bytes(lambda: [(x + x).sum() for _ in range(3)]) < 500_000, "freed memory does not count again"


@pytest.mark.parametrize("case", NEEDS)
def test_budget_and_gradients(case):
    peak, budget, asked, layout = measure(4096, NEEDS[case], torch.float32)
    assert budget <= peak <= budget + asked + slack(layout, torch.float32), (peak, budget, asked)


@pytest.mark.parametrize("case", NEEDS)
def test_budget_and_gradients_bfloat16(case):
    """The weight's gradient accumulates in float32 over chunks: that accumulator is what it costs beside the result."""
    wide = 320
    peak, budget, asked, layout = measure(1024, NEEDS[case], torch.bfloat16, H=wide)
    accumulator = V * wide * 4 if NEEDS[case][1] else 0
    allowed = slack(layout, torch.bfloat16, wide)
    assert allowed < 0.9 * V * wide * 2, "a second (V, H) would not be seen"
    assert peak <= budget + asked + accumulator + allowed, (peak, budget, asked, accumulator)


@pytest.mark.parametrize("case", ["none", "frozen", "trained", "weight"])
def test_flat_over_sequence_length(case):
    """1k, 2k and 4k tokens at one budget: within 5% beyond the gradient of the hidden states, which is as long as
    they are."""
    beyond = []
    for tokens in (1024, 2048, 4096):
        peak, _, asked, layout = measure(tokens, NEEDS[case], torch.float32)
        beyond.append(peak - asked - 100 * layout.num_rows)
    assert max(beyond) <= 1.05 * min(beyond) or max(beyond) <= beyond[0], beyond


def test_flat_when_units_are_recomputed():
    """One pair of steps as long as the batch."""
    beyond = []
    for tokens in (1024, 4096):
        peak, _, asked, layout = measure(tokens, NEEDS["trained"], torch.float32, step=tokens // 4)
        assert layout.num_steps == 2
        beyond.append(peak - asked - 100 * layout.num_rows)
    assert beyond[1] <= 1.05 * beyond[0], beyond


@pytest.mark.parametrize("case", ["none", "frozen", "all"])
def test_step_logps(case):
    peak, budget, asked, layout = measure(4096, NEEDS[case], torch.float32, fn=linear_step_logps)
    assert peak <= budget + asked + slack(layout, torch.float32), (peak, budget, asked)


@pytest.mark.parametrize("case", ["frozen", "trained"])
def test_upstream_gradient_makes_no_copy(case):
    """Gradients larger than the budget, and a factor to multiply them by: over what was kept, not beside it."""
    peak, budget, asked, layout = measure(4096, NEEDS[case], torch.float32, H=400, upstream=0.5)
    assert asked > 2 * budget
    assert peak <= budget + asked + slack(layout, torch.float32, 400), (peak, budget, asked)


def test_frozen_head_allocates_no_weight_gradient():
    """field.md: others allocate it in full."""
    frozen, *_ = measure(512, NEEDS["frozen"], torch.float32)
    trained, *_ = measure(512, NEEDS["trained"], torch.float32)
    assert trained - frozen >= 0.95 * V * H * 4


def test_no_grad_allocates_no_gradient():
    layout, pairs = batch(2048)
    leaves = problem(layout.shape, V, H).leaves()
    chunk_bytes = ROWS * V * 4

    def run():
        with torch.no_grad():
            linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=chunk_bytes)

    assert peak_bytes(run) <= chunk_bytes + slack(layout, torch.float32)


@pytest.mark.parametrize("tokens", [256, 2048])
def test_the_plan_names_the_buffer(tokens):
    """The largest allocation of a call without gradients is plan.buffer_bytes, short batch or long."""
    peak, budget, _, layout = measure(tokens, NEEDS["none"], torch.float32)
    named = pref_plan(
        layout,
        layout.pair_by_index(),
        vocab=V,
        hidden=H,
        chunk_bytes=budget,
        hidden_gradient=False,
        weight_gradient=False,
    ).buffer_bytes
    assert named <= peak <= named + slack(layout, torch.float32), (peak, named)


def test_backward_leaves_nothing_behind():
    """What forward kept goes with the graph: afterwards only the gradients are allocated."""
    layout, pairs = batch(2048)
    leaves = problem(layout.shape, V, H).leaves()

    def run():
        linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=ROWS * V * 4).loss.backward()

    _, live = memory(run)
    gradients = sum(t.numel() * 4 for t in leaves)
    assert gradients <= live <= gradients + 50_000
