# SPDX-License-Identifier: Apache-2.0
"""The linear route where there is nothing to score, at labels and numbers out of range, and its error messages.

Mutations of sspo_ext/routes/linear, and the test that catches each:
* weight gradient not zero with nothing to score: test_nothing_to_score
* labels not checked: test_label_outside_the_vocabulary
"""

import itertools

import pytest
import torch
from helpers.batch import random_batch
from helpers.linear import (
    GRADIENTS,
    layout_of_lengths,
    pairs_of,
    problem,
)
from helpers.linear_route import BF16, F16, F32, SHAPE, H, V, assert_same, linear_route, units_batch

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss

EMPTY = {
    "no scored token": lambda: StepLayout.from_step_ids(torch.full(SHAPE, -100), torch.full(SHAPE, -1)),
    "empty steps": lambda: StepLayout.from_step_ids(torch.full(SHAPE, -100), torch.zeros(SHAPE, dtype=torch.int64)),
    "all weights zero": lambda: StepLayout.from_step_ids(
        torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(SHAPE, dtype=torch.int64), token_weights=torch.zeros(SHAPE)
    ),
    "no pairs": lambda: StepLayout.from_step_ids(
        torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(SHAPE, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_nothing_to_score(what, gradients):
    layout = EMPTY[what]()
    for dtype, loss_type in ((F32, "sigmoid"), (BF16, "simpo"), (F32, "ipo")):
        p = problem(SHAPE, V, H, hidden_dtype=dtype, weight_dtype=dtype)
        pairs = pairs_of(layout) if what == "no pairs" else None
        leaves = p.leaves(GRADIENTS[gradients])
        out = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], loss_type=loss_type)
        assert out.loss == 0 and out.loss.requires_grad
        out.loss.backward()
        for t in leaves:
            assert not t.requires_grad or (t.grad.shape == t.shape and torch.count_nonzero(t.grad) == 0)
        assert all(torch.isfinite(v) for v in out.metrics.values())
        sums = linear_step_logps(*p.leaves(GRADIENTS[gradients])[:2], layout).sums
        assert torch.isfinite(sums).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_no_positions(shape):
    layout = StepLayout.from_step_ids(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
    for needs in GRADIENTS.values():
        got = linear_route(problem(shape, V, H), layout, None, needs=needs)
        assert all(g is None or torch.count_nonzero(g) == 0 for g in got)


def test_pair_with_a_fully_masked_step():
    """field.md: means over no tokens are NaN elsewhere. Here the pair is dropped and the other one stays."""
    layout = layout_of_lengths([3, 0, 2, 4], V)
    p = problem((1, layout.shape[1]), V, H)
    for loss_type, needs, rows in itertools.product(("simpo", "ipo"), ((1, 0, 0), (1, 1, 1)), (10_000, 2)):
        both = linear_route(p, layout, pairs_of(layout, (0, 1), (2, 3)), needs=needs, rows=rows, loss_type=loss_type)
        one = linear_route(p, layout, pairs_of(layout, (2, 3)), needs=needs, rows=rows, loss_type=loss_type)
        assert_same(both, one, 1e-6)


def test_label_outside_the_vocabulary():
    labels, ids = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    labels[1, 4] = V
    layout = StepLayout.from_step_ids(labels, ids)
    p = problem((2, 6), V, H)
    for fn in (linear_step_pref_loss, linear_step_logps):
        with pytest.raises(ValueError, match=rf"labels.*{V}.*sequence 1 at position 4"):
            fn(p.hidden, p.weight, layout)


def test_ignored_label_gives_neither_loss_nor_gradient():
    """field.md: others return a finite wrong -log Z for it."""
    labels = torch.full((2, 6), 3)
    labels[0, 3] = -100
    layout = StepLayout.from_step_ids(labels, torch.zeros(2, 6, dtype=torch.int64))
    got = linear_route(problem((2, 6), V, H), layout, None, needs=(1, 1, 1))
    assert layout.num_rows == 9 and torch.count_nonzero(got[1][0, 2]) == 0 and torch.count_nonzero(got[1][0, 1]) > 0


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
def test_float16_with_large_logits(needs):
    """Logits up to 6e4, scaled beyond 65504 by logit_scale: kernels that keep scaled logits in float16 give NaN."""
    layout = layout_of_lengths([3, 3], V)
    p = problem((1, 7), V, H, bias=False, hidden_dtype=F16, weight_dtype=F16)
    logits = p.hidden.double() @ p.weight.double().t()
    p.hidden = (p.hidden.double() * (5e4 / logits.abs().max())).half()
    got = linear_route(p, layout, pairs_of(layout, (0, 1)), needs=(*needs[:2], 0), logit_scale=4.0, beta=1e-6)
    assert all(g is None or torch.isfinite(g).all() for g in got)


def test_errors_name_the_argument():
    layout, pairs, _ = units_batch()
    p = problem(SHAPE, V, H)
    other, _, _ = units_batch(seed=9)

    def call(hidden=p.hidden, weight=p.weight, layout=layout, pairs=pairs, **kw):
        return linear_step_pref_loss(hidden, weight, layout, pairs, **kw)

    for match, kw in {
        "hidden": {"hidden": p.hidden[:, :-1]},
        "hidden: expected a torch.Tensor": {"hidden": None},
        "hidden: expected a tensor of": {"hidden": p.hidden.long()},
        "weight": {"weight": p.weight[:, :-1]},
        "weight: expected a tensor of": {"weight": p.weight.int()},
        "weight: expected a torch.Tensor": {"weight": None},
        "bias": {"bias": p.bias[:-1]},
        "layout: expected a StepLayout": {"layout": torch.zeros(SHAPE)},
        "pairs": {"layout": other},
        "chunk_bytes": {"chunk_bytes": 0},
        "chunk_bytes: ": {"chunk_bytes": 1.5},
        "temperature": {"temperature": 0.0},
        "logit_scale": {"logit_scale": float("nan")},
        "logit_softcap": {"logit_softcap": -1.0},
        "loss_type": {"loss_type": "dpo"},
        "label_smothing": {"label_smothing": 0.1},
        "ref": {"ref": torch.zeros(3)},
        "backend": {"backend": "cuda9"},
        "reduction": {"reduction": "none"},
        "num_items": {"num_items": -1},
        "weight_grad": {"weight_grad": torch.zeros(3)},
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call(**kw)


def test_plain_tensors_say_what_to_build():
    batch = random_batch(0, *SHAPE, V=V)
    p = problem(SHAPE, V, H)
    with pytest.raises(TypeError, match="StepLayout"):
        linear_step_pref_loss(p.hidden, p.weight, batch.labels, batch.step_ids)
