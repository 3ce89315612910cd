# SPDX-License-Identifier: Apache-2.0
"""`batch_invariant=True`: a row's log-prob has the same bits alone, in another batch and at another chunk budget.

Without it a row alone differs here in float32 and float64: a product of one row is not computed as one of many is. In
float64 hidden states of an odd size at their own addresses gave other bits at every second place of a tile.

Shown to fail, each by the test named:
  a last tile of the rows that are left             test_same_bits_in_every_batch[float64]
  tiles of a chunk's size                           test_what_ran_is_what_was_planned (no bits changed here)
  hidden states multiplied where they lie           test_same_bits_in_every_batch[float64]
  products of the reference of kl of any size       test_reductions[float64]
  rows of padding forgotten in the plan             test_what_ran_is_what_was_planned
"""

import functools

import pytest
import torch
from helpers.linear import gemm_flops, problem

from sspo_ext import backends
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import policy_plan, pref_plan
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.routes.linear.budget import tile_rows

H, B, T = 131, 6, 52
TILE = tile_rows(True, torch.device("cpu"))
HEADS = [(1001, True), (1001, False), (512, True)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
pytestmark = pytest.mark.filterwarnings("ignore:ref")


def layout_of(labels):
    ids = torch.full_like(labels, -1)
    ids[:, 1:] = torch.arange(labels.shape[1] - 1) // 10
    return StepLayout.from_step_ids(labels, ids)


def batch(dtype, V, bias):
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    return labels, problem((B, T), V, H, bias=bias, hidden_dtype=dtype, weight_dtype=dtype)


def call(function, p, labels, which, needs=(0, 0, 0), **options):
    """The function on some of the sequences."""
    hidden, weight, bias = p.leaves(needs)
    return function(hidden[which], weight, layout_of(labels[which]), bias=bias, batch_invariant=True, **options)


@pytest.mark.parametrize(("V", "bias"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_bits_in_every_batch(dtype, V, bias):
    labels, p = batch(dtype, V, bias)
    everyone = torch.arange(B)
    whole = call(linear_step_logps, p, labels, everyone)
    tokens, sums = whole.tokens.view(B, -1), whole.sums.view(B, -1)
    for which in ([0], [4], [5, 2], [3, 0, 1, 4, 2]):
        for chunk_bytes in (1, 2 * TILE * V * dtype.itemsize, None):
            got = call(linear_step_logps, p, labels, torch.tensor(which), chunk_bytes=chunk_bytes)
            assert torch.equal(got.tokens.view(len(which), -1), tokens[which]), (which, chunk_bytes)
            assert torch.equal(got.sums.view(len(which), -1), sums[which]), (which, chunk_bytes)
    torch.testing.assert_close(
        whole.tokens, linear_step_logps(p.hidden, p.weight, layout_of(labels), bias=p.bias).tokens
    )


@pytest.mark.parametrize("V", [1001, 512])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_bits_at_every_place_of_a_tile(dtype, V):
    """The same row at all places of two tiles, among others, and alone."""
    _, p = batch(dtype, V, True)
    g = torch.Generator().manual_seed(2)
    label, row = 7, torch.randn(H, generator=g).to(dtype)

    def logp(rows, place):
        hidden = torch.randn(1, rows + 1, H, generator=g).to(dtype)
        hidden[0, place] = row
        labels = torch.full((1, rows + 1), label)
        layout = StepLayout.from_step_ids(labels, torch.zeros_like(labels))
        return linear_step_logps(hidden, p.weight, layout, bias=p.bias, batch_invariant=True).tokens[place]

    alone = logp(1, 0)
    for place in range(0, 2 * TILE, 7):
        assert torch.equal(logp(2 * TILE, place), alone), place


@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("rows", [TILE, 10 * TILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_function_has_the_bits_of_the_log_probs(dtype, needs, rows):
    """Whatever gradients are made meanwhile, in whatever order of the rows."""
    V = 1001
    labels, p = batch(dtype, V, True)
    everyone, chunk_bytes = torch.arange(B), rows * V * dtype.itemsize
    want = call(linear_step_logps, p, labels, everyone, chunk_bytes=1)
    options = {"needs": needs, "chunk_bytes": chunk_bytes}
    assert torch.equal(call(linear_step_logps, p, labels, everyone, **options).tokens, want.tokens)
    assert torch.equal(call(linear_step_pref_loss, p, labels, everyone, **options).step_logps, want.sums)
    advantages = torch.linspace(-1, 1, len(want.sums)).to(want.tokens.dtype)
    advantages[:3] = 0
    for level in ("token", "step", "sequence"):
        policy = functools.partial(
            linear_step_policy_loss, advantages=advantages, loss_type="ppo", importance_sampling_level=level
        )
        assert torch.equal(call(policy, p, labels, everyone, **options).tokens, want.tokens)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reductions(dtype):
    labels, p = batch(dtype, 1001, True)
    other = problem((B, T), 1001, 2 * H - 1, seed=3, hidden_dtype=dtype, weight_dtype=dtype)

    def values(which, **more):
        ref = {"kl_ref_hidden": other.hidden[which], "kl_ref_weight": other.weight, "kl_ref_bias": other.bias}
        out = call(linear_step_logps, p, labels, which, entropy=True, sum_p2=True, **ref, **more)
        return [x.view(len(which), -1) for x in (out.tokens, out.entropy, out.sum_p2, out.kl)]

    whole, which = values(torch.arange(B)), torch.tensor([5, 2])
    for more in ({}, {"chunk_bytes": 1}):
        for got, want in zip(values(which, **more), whole, strict=True):
            assert torch.equal(got, want[which])


@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [1, 2 * TILE, 1000])
def test_what_ran_is_what_was_planned(needs, level, rows):
    V = 53
    labels, p = batch(torch.float32, V, True)
    sizes = {"vocab": V, "hidden": H, "chunk_bytes": rows * V * 4, "batch_invariant": True}
    wanted = dict(zip(("hidden_gradient", "weight_gradient", "bias_gradient"), map(bool, needs), strict=True))
    layout = layout_of(labels)
    options = {"chunk_bytes": rows * V * 4, "needs": needs}

    def step(function):
        loss = call(function, p, labels, torch.arange(B), **options).loss
        if loss.requires_grad:
            loss.backward()

    assert gemm_flops(lambda: step(linear_step_pref_loss)) == pref_plan(layout, **sizes, **wanted).flops
    # with an entropy bonus gradients are made in forward with a frozen head too, which the plan is of
    policy = functools.partial(
        linear_step_policy_loss, advantages=torch.ones(layout.num_steps), loss_type="ppo", entropy_coef=0.1,
        importance_sampling_level=level,
    )  # fmt: skip
    plan = policy_plan(layout, importance_sampling_level=level, **sizes, **wanted)
    assert gemm_flops(lambda: step(policy)) == plan.flops
    assert all((end - start) % TILE == 0 for g in plan.groups for start, end in g.chunks[:-1])
    assert plan.buffer_bytes % (TILE * V * 4) == 0


def test_gradients_are_right():
    labels, p = batch(torch.float64, 1001, True)
    found = []
    for more in ({"batch_invariant": True, "chunk_bytes": 1}, {}):
        leaves = p.leaves()
        linear_step_pref_loss(*leaves[:2], layout_of(labels), bias=leaves[2], **more).loss.backward()
        found.append([leaf.grad for leaf in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_refusals(monkeypatch):
    labels, p = batch(torch.float32, 53, False)
    with pytest.raises(TypeError, match="batch_invariant: expected"):
        linear_step_logps(p.hidden, p.weight, layout_of(labels), batch_invariant=1)
    with pytest.raises(ValueError, match="'reference' has no tp_group, weight_grad or batch_invariant"):
        linear_step_logps(p.hidden, p.weight, layout_of(labels), batch_invariant=True, backend="reference")
    monkeypatch.setattr(backends, "select", lambda *args: "cuda")
    with pytest.raises(ValueError, match="'cuda' has no batch_invariant"):
        linear_step_logps(p.hidden, p.weight, layout_of(labels), batch_invariant=True)


def test_compiled():
    labels, p = batch(torch.float32, 53, False)
    layout = layout_of(labels)

    def tokens():
        return linear_step_logps(p.hidden, p.weight, layout, batch_invariant=True).tokens

    assert torch.equal(torch.compile(tokens, backend="aot_eager", fullgraph=True)(), tokens())
