# SPDX-License-Identifier: Apache-2.0
"""linear_step_logps: sums and tokens, their gradients, a policy loss on top.

Mutation of sspo_ext/routes/linear, and the test that catches it:
* token weights dropped from d sums: test_step_logps
"""

import pytest
import torch
from helpers.batch import random_pairs
from helpers.linear import (
    GRADIENTS,
    assert_linear_rule,
    collect,
    problem,
)
from helpers.linear_route import BF16, F32, F64, NAMES, SHAPE, H, V, assert_same, budget, units_batch

from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.pref import linear_step_pref_loss


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("rows", [10_000, 5, 1])
def test_step_logps(gradients, rows):
    """Sums and tokens, with a gradient into both that differs from row to row."""
    needs = GRADIENTS[gradients]
    layout, _, _ = units_batch(seed=2)
    g = torch.Generator().manual_seed(1)
    to_sums, to_tokens = (
        torch.randn(layout.num_steps, generator=g, dtype=F64),
        torch.randn(layout.num_rows, generator=g, dtype=F64),
    )
    head = {"logit_softcap": 6.0, "temperature": 0.9}
    for dtype in (F64, F32, BF16):
        p = problem(SHAPE, V, H, scale=2.0, hidden_dtype=dtype, weight_dtype=dtype)

        def run(leaves, make):
            out = make(leaves)
            value = (out.sums * to_sums.to(out.sums.dtype)).sum() + (out.tokens * to_tokens.to(out.tokens.dtype)).sum()
            return [out.sums.detach(), out.tokens.detach(), *collect(value, leaves)[1:]]

        def logits(leaves):
            return step_logps(torch.nn.functional.linear(*leaves), layout, backend="reference", **head)

        def linear(leaves, rows=rows, dtype=dtype):
            return linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=budget(rows, dtype), **head)

        got = run(p.leaves(needs), linear)
        same, truth = run(p.leaves(needs), logits), run(p.leaves(needs, F64), logits)
        assert got[0].dtype == (F64 if dtype == F64 else F32)
        for name, a, b, t in zip(("sums", "tokens", *NAMES[1:]), got, same, truth, strict=True):
            assert (a is None) == (t is None), name
            if a is not None:
                assert_linear_rule(name, a, b, t, dtype)


def test_step_logps_counts_and_detached_use():
    layout, _, _ = units_batch(seed=2)
    p = problem(SHAPE, V, H)
    with torch.no_grad():
        ref = linear_step_logps(p.hidden, p.leaves()[1], layout, bias=p.bias)
    assert not ref.sums.requires_grad and torch.equal(ref.counts, layout.counts)
    # a model that is its own reference has rewards of exactly 0 on the same kernels and chunks
    out = linear_step_pref_loss(p.hidden, p.weight, layout, random_pairs(layout, 0), bias=p.bias, ref=ref)
    assert out.rewards.abs().max() < 1e-5


def test_step_logps_into_a_policy_loss():
    """A loss of the user's own on top: ratio of step probabilities, clipped."""
    layout, _, _ = units_batch(seed=3, weighted=False)
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    g = torch.Generator().manual_seed(2)
    old, advantage = (
        torch.randn(layout.num_steps, generator=g, dtype=F64),
        torch.randn(layout.num_steps, generator=g, dtype=F64),
    )

    def loss(sums):
        ratio = torch.exp((sums - sums.detach() + 0.1 * old).clamp(-1, 1))
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    leaves, twins = p.leaves(), p.leaves()
    got = collect(loss(linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=budget(5, F64)).sums), leaves)
    want = collect(loss(step_logps(torch.nn.functional.linear(*twins), layout, backend="reference").sums), twins)
    assert_same(got, want)
