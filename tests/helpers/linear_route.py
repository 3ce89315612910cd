# SPDX-License-Identifier: Apache-2.0
"""One batch of several units for the linear route, its loss and gradients, and the rule that they are held to."""

import torch

from helpers.batch import random_batch
from helpers.linear import (
    assert_linear_rule,
    collect,
    errors,
    logits_route,
    truth_of,
)
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.losses.pref import linear_step_pref_loss

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPE, V, H = (4, 12), 37, 13


def budget(rows, dtype, vocab=V):
    return rows * vocab * dtype.itemsize


def units_batch(seed=0, weighted=True):
    """Ragged steps (some empty, some in no pair), pairs that share steps, weights, margins and a reference:
    several units."""
    batch = random_batch(seed, *SHAPE, V=V, weighted=weighted)
    layout = batch.layout
    S = layout.num_steps
    g = torch.Generator().manual_seed(seed)
    # neighbours in a shuffled order share steps in threes, and the last steps stay without a partner
    order = torch.randperm(S, generator=g)
    index = [(order[i], order[i + 1]) for i in range(0, S - 2, 3)] + [
        (order[i + 2], order[i]) for i in range(0, S - 4, 3)
    ]
    P = len(index)
    pairs = StepPairs.from_index(
        layout, torch.tensor(index), weights=torch.rand(P, generator=g) * 2, margins=torch.rand(P, generator=g)
    )
    return layout, pairs, {"ref": torch.randn(S, generator=g) * 3}


def linear_route(p, layout, pairs, *, needs=(1, 1, 1), upstream=1.0, rows=10_000, **options):
    leaves = p.leaves(needs)
    hidden, weight, bias = leaves
    loss = linear_step_pref_loss(
        hidden, weight, layout, pairs, bias=bias, chunk_bytes=budget(rows, p.dtype, weight.shape[0]), **options
    ).loss
    return collect(loss, leaves, upstream)


NAMES = ("loss", "hidden.grad", "weight.grad", "bias.grad")


def assert_rule(p, layout, pairs, *, needs=(1, 1, 1), upstream=1.0, rows=10_000, **options):
    got = linear_route(p, layout, pairs, needs=needs, upstream=upstream, rows=rows, **options)
    same = logits_route(p, layout, pairs, dtype=p.dtype, needs=needs, upstream=upstream, **options)
    truth = truth_of(p, layout, pairs, needs=needs, upstream=upstream, **options)
    assert got[0].dtype == (F64 if p.dtype == F64 else F32)
    for name, a, b, t, leaf in zip(NAMES, got, same, truth, (None, p.hidden, p.weight, p.bias), strict=True):
        assert (a is None) == (t is None), f"{name}: {'missing' if a is None else 'not asked for'}"
        if a is not None:
            assert leaf is None or a.dtype == leaf.dtype, f"{name} has dtype {a.dtype}"
            assert_linear_rule(name, a, b, t, p.dtype)


def assert_same(got, want, rel=1e-11):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            worst, size = errors(a, b.double())[0], b.double().abs().max().item() if b.numel() else 0.0
            assert worst <= rel * size + rel * 1e-3, f"{name}: off by {worst:.3g} of {size:.3g}"
