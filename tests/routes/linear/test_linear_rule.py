# SPDX-License-Identifier: Apache-2.0
"""The linear route against float64: every case of the schedule, every gradient, every dtype, under autocast too.

Mutations of sspo_ext/routes/linear, and the test that catches each:
* upstream gradient dropped; late float16 scale not applied to gradients: test_fp64_rule
* coef, token weights, reference, pair weights or margins of the wrong rows, steps or pairs: test_fp64_rule
* loss of the last group alone; coef not put back in the layout's order: test_fp64_rule
* weight or bias gradient of the last chunk alone; bias not added; hidden gradient not started at 0: test_fp64_rule
* 16-bit weight gradient accumulated in place: test_autocast
* softcap dropped in the gradient: test_head_details
* bias gradient rounded to the weight's dtype: test_bias_in_its_own_dtype
* autocast ignored: test_autocast
"""

import itertools

import pytest
import torch
from helpers.linear import (
    GRADIENTS,
    assert_linear_rule,
    collect,
    layout_of_lengths,
    logits_route,
    pairs_of,
    problem,
    truth_of,
)
from helpers.linear_route import BF16, F16, F32, F64, NAMES, SHAPE, H, V, assert_rule, budget, linear_route, units_batch

from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss

# chunk budget in rows -> the cases of the schedule it brings about for the batch below
CHUNKS = {"one chunk": 10_000, "units fit in chunks": 14, "units larger than a chunk": 4, "one-row chunks": 1}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_fp64_rule(chunks, gradients):
    layout, pairs, options = units_batch()
    for dtype in (F64, F32, BF16, F16):
        p = problem(SHAPE, V, H, hidden_dtype=dtype, weight_dtype=dtype)
        assert_rule(p, layout, pairs, needs=GRADIENTS[gradients], rows=CHUNKS[chunks], upstream=-1.7, **options)


@pytest.mark.parametrize("hidden, weight", [(BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (F64, F32), (F16, BF16)])
@pytest.mark.parametrize("gradients", ["hidden", "all"])
def test_mixed_dtypes(hidden, weight, gradients):
    """field.md: most others fail on these. GEMMs run in the promoted dtype; each gradient comes in its tensor's."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=hidden, weight_dtype=weight)
    for rows in (10_000, 4):
        assert_rule(p, layout, pairs, needs=GRADIENTS[gradients], rows=rows, **options)


def test_bias_in_its_own_dtype():
    """A float32 bias beside a bfloat16 head keeps a float32 gradient, not one rounded to the head's dtype."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=BF16, weight_dtype=BF16)
    p.bias = p.bias.float()
    d_bias = linear_route(p, layout, pairs, **options)[3]
    assert d_bias.dtype == F32 and not torch.equal(d_bias.bfloat16().float(), d_bias)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_every_loss(loss_type):
    layout, pairs, options = units_batch(seed=1)
    if loss_type == "simpo":
        options = {}
    p = problem(SHAPE, V, H)
    for rows, needs in itertools.product((10_000, 4), ((1, 1, 1), (1, 0, 0))):
        assert_rule(p, layout, pairs, needs=needs, rows=rows, loss_type=loss_type, beta=0.3, **options)


@pytest.mark.parametrize(
    "head",
    [
        {"temperature": 0.7},
        {"logit_scale": 0.0625},
        {"logit_softcap": 5.0},
        {"logit_softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
    ],
    ids=str,
)
def test_head_details(head):
    layout, pairs, options = units_batch(seed=2)
    for dtype, bias in ((F64, True), (F32, False), (BF16, True)):
        p = problem(SHAPE, V, H, bias=bias, scale=4.0, hidden_dtype=dtype, weight_dtype=dtype)
        for rows, needs in ((10_000, (1, 1, 1)), (4, (1, 1, 1)), (5, (1, 0, 0))):
            needs = needs if bias else (*needs[:2], 0)
            assert_rule(p, layout, pairs, needs=needs, rows=rows, **head, **options)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_autocast(dtype, needs):
    """Float32 tensors, GEMMs in autocast's dtype, float32 gradients; backward runs outside of autocast, as
    trainers do."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    truth = truth_of(p, layout, pairs, needs=needs, **options)
    same = logits_route(p, layout, pairs, dtype=dtype, needs=needs, **options)
    for rows in (10_000, 4):
        leaves = p.leaves(needs)
        with torch.autocast("cpu", dtype):
            loss = linear_step_pref_loss(
                *leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=budget(rows, dtype), **options
            ).loss
        for name, a, b, t in zip(NAMES, collect(loss, leaves), same, truth, strict=True):
            if a is not None:
                assert a.dtype == F32
                assert_linear_rule(name, a, b, t, dtype)
    assert loss.item() != linear_route(p, layout, pairs, needs=needs, **options)[0].item(), "autocast was not applied"


@pytest.mark.parametrize("rows", [10_000, 4, 1])
@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_gradcheck(rows, needs):
    layout = layout_of_lengths([2, 3, 0, 2, 1], 7)
    pairs = pairs_of(layout, (0, 1), (3, 1), (2, 0), weights=torch.tensor([1.0, 0.5, 2.0]))
    p = problem((1, layout.shape[1]), 7, 4, hidden_dtype=F64, weight_dtype=F64)
    options = {"bias": None, "chunk_bytes": budget(rows, F64, 7), "logit_softcap": 4.0, "temperature": 0.8}

    def loss(h, w, b):
        return linear_step_pref_loss(h, w, layout, pairs, **{**options, "bias": b}).loss

    def sums(h, w, b):
        out = linear_step_logps(h, w, layout, **{**options, "bias": b})
        return out.sums, out.tokens

    for fn in (loss, sums):
        assert torch.autograd.gradcheck(fn, p.leaves(needs), fast_mode=False)
