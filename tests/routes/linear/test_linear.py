"""The linear route against float64 truth and against the logits route: every case of the schedule, every gradient,
every dtype.

Mutations of sspo_ext/{linear,linear_engine,linear_ops,autograd}.py, and the test that catches each:
* upstream gradient dropped; late float16 scale not applied to gradients: test_fp64_rule
* coef, token weights, reference, pair weights or margins of the wrong rows, steps or pairs: test_fp64_rule
* loss of the last group alone; coef not put back in the layout's order: test_fp64_rule
* weight or bias gradient of the last chunk alone; bias not added; hidden gradient not started at 0: test_fp64_rule
* 16-bit weight gradient accumulated in place: test_autocast
* float16 gradients divided before the loss scale reaches them: test_upstream_gradient
* float16 gradients kept from forward: test_float16_overflows_where_the_logits_route_does
* kept gradient overwritten though the graph is kept: test_backward_twice
* upstream rounded to the kept dtype; rows of factor 0 not cleared: test_scaling_what_was_kept
* softcap dropped in the gradient: test_head_details
* bias gradient rounded to the weight's dtype: test_bias_in_its_own_dtype
* step sums or pair losses not put back in order: test_equals_the_logits_route
* weight gradient not zero with nothing to score: test_nothing_to_score
* buffer filled in forward, overwritten, or its gradient given to autograd too: test_weight_grad_buffer
* autocast ignored: test_autocast
* token weights dropped from d sums: test_step_logps
* double backward not refused: test_second_derivative_is_refused
* labels not checked: test_label_outside_the_vocabulary
"""

import itertools

import pytest
import torch
from helpers.batch import random_batch, random_pairs
from helpers.linear import (
    GRADIENTS,
    assert_linear_rule,
    collect,
    errors,
    gemm_flops,
    layout_of_lengths,
    logits_route,
    pairs_of,
    problem,
    truth_of,
)

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses import pref_plan
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss
from sspo_ext.routes import shared as autograd

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# chunk budget in rows -> the cases of the schedule it brings about for the batch below
CHUNKS = {"one chunk": 10_000, "units fit in chunks": 14, "units larger than a chunk": 4, "one-row chunks": 1}
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


# ---- the fp64 rule


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


# ---- the upstream gradient


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("upstream", [1 / 3, -2.0, 65536.0])
@pytest.mark.parametrize("gradients", ["hidden", "all"])
def test_upstream_gradient(dtype, upstream, gradients):
    """1/3: gradient accumulation, a factor that bfloat16 cannot hold. 65536: GradScaler's first scale, which
    float16 cannot hold."""
    layout, pairs, options = units_batch(seed=3)
    p = problem(SHAPE, V, H, hidden_dtype=dtype, weight_dtype=dtype)
    # small enough that scaled float16 gradients stay below 65504
    for rows in (10_000, 4):
        assert_rule(
            p,
            layout,
            pairs,
            needs=GRADIENTS[gradients],
            rows=rows,
            upstream=upstream,
            num_items=2e4 if upstream > 1e4 else None,
            **options,
        )


def test_float16_gradients_survive_a_small_scale():
    """With many items d loss/d logit is below float16's smallest number; the loss scale must reach it before it is
    rounded."""
    layout, pairs, options = units_batch(seed=3)
    p = problem(SHAPE, V, H, hidden_dtype=F16, weight_dtype=F16)
    for needs in ((1, 0, 0), (1, 1, 1)):
        exact = truth_of(p, layout, pairs, needs=needs, upstream=2.0**24, num_items=1e7, **options)
        got = linear_route(p, layout, pairs, needs=needs, upstream=2.0**24, num_items=1e7, **options)
        for name, a, t in zip(NAMES[1:], got[1:], exact[1:], strict=True):
            if a is not None:
                assert errors(a, t)[1] <= 5e-3 * t.square().mean().sqrt(), name


@pytest.mark.parametrize("rows", [10_000, 64])
@pytest.mark.parametrize("accum_dtype", [None, F16])
def test_float16_overflows_where_the_logits_route_does(accum_dtype, rows):
    """A gradient of 900,000 under a loss scale of 1/64: what the logits route holds, with the normaliser and the scale
    in every product, is held here too, in one product or in several."""
    g = torch.Generator().manual_seed(0)
    labels = torch.full((8, 257), 3)
    labels[4:] = torch.randint(0, 64, (4, 257), generator=g)
    layout = StepLayout.from_step_ids(labels, torch.zeros_like(labels))
    hidden, weight = torch.randn(8, 257, 16, generator=g) * 0.3 + 3, torch.randn(64, 16, generator=g) * 0.05
    ref = torch.full((layout.num_steps,), -400.0)  # a difference of 700, squared by the head

    def gradients(linear):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", F16):
            if linear:
                chunk = {"chunk_bytes": budget(rows, F16, 64), "accum_dtype": accum_dtype}
                loss = linear_step_pref_loss(*leaves, layout, ref=ref, loss_type="sppo_hard", **chunk).loss
            else:
                logits = torch.nn.functional.linear(*leaves)
                loss = step_pref_loss(logits, layout, ref=ref, loss_type="sppo_hard").loss
        (loss / 64).backward()
        return [t.grad for t in leaves]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert want.isfinite().all() and want.abs().max() > 0
        assert (got - want).abs().max() <= 2e-3 * want.abs().max()


def test_float16_trains_in_four_products():
    layout, pairs, options = units_batch(seed=3)
    leaves = problem(SHAPE, V, H, hidden_dtype=F16, weight_dtype=F16).leaves()
    plan = pref_plan(layout, pairs, vocab=V, hidden=H, dtype=F16)
    assert plan.gemm_rows == 4 * layout.num_rows

    def step():
        linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss.backward()

    assert gemm_flops(step) == plan.flops


def test_zero_upstream_and_unused_loss():
    layout, pairs, _ = units_batch()
    got = linear_route(problem(SHAPE, V, H), layout, pairs, upstream=0.0)
    assert all(torch.count_nonzero(g) == 0 for g in got[1:])


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_backward_twice(needs, upstream):
    """retain_graph: the second backward adds the same gradient again."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    want = linear_route(p, layout, pairs, needs=needs, rows=5, **options)
    leaves = p.leaves(needs)
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], chunk_bytes=budget(5, F32), **options).loss
    (loss * upstream).backward(retain_graph=True)
    (loss * upstream).backward()
    for t, g in zip(leaves, want[1:], strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad, 2 * g * upstream, rtol=1e-5, atol=1e-9)


def test_gradients_zeroed_between_two_backwards():
    """optimizer.zero_grad(set_to_none=False) between them: right, or autograd's error about a changed tensor;
    never a wrong number."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    want = linear_route(p, layout, pairs, **options)
    leaves = p.leaves()
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss
    loss.backward(retain_graph=True)
    for t in leaves:
        t.grad.zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        for t, g in zip(leaves, want[1:], strict=True):
            torch.testing.assert_close(t.grad, g)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (0, 5)])
def test_scaling_what_was_kept(monkeypatch, dtype, shape):
    """The product in float32, rounded once, block by block; factors that the kept dtype cannot hold; rows of
    factor 0 are zeros."""
    monkeypatch.setattr(autograd, "_BLOCK_ELEMENTS", 10)
    g = torch.Generator().manual_seed(0)
    kept = torch.randn(shape, generator=g, dtype=F64).to(dtype) * 1e-3
    wide = torch.promote_types(dtype, F32)
    for scale in (torch.tensor(1 / 3), torch.tensor(1e5), torch.tensor(1.0), torch.rand(shape[0], 1, generator=g)):
        assert torch.equal(
            autograd.scale_kept(kept.clone(), scale.to(wide)), (kept.to(wide) * scale.to(wide)).to(dtype)
        )
    if shape[0] > 2:
        scale, broken = torch.ones(shape[0], 1), kept.clone()
        scale[2], broken[2] = 0.0, float("nan")
        assert torch.count_nonzero(autograd.scale_kept(broken.clone(), scale.to(wide))[2]) == 0


def test_gradient_of_one_step_is_not_touched_by_another():
    """A frozen head, NaN in a step whose sum gets no gradient."""
    layout = layout_of_lengths([3, 4], V)
    p = problem((1, layout.shape[1]), V, H)
    p.hidden[0, 4] = float("nan")
    for needs in ((1, 0, 0), (1, 1, 1)):
        leaves = p.leaves(needs)
        linear_step_logps(*leaves[:2], layout, bias=leaves[2]).sums[0].backward()
        assert torch.count_nonzero(leaves[0].grad[0, 3:7]) == 0 and leaves[0].grad[0, :3].abs().sum() > 0


def test_kept_gradient_handed_out_and_changed():
    """autograd.grad may hand out what is kept for a second backward: changing it is an error or harmless, never a
    wrong number."""
    layout, pairs, options = units_batch()
    hidden, weight, bias = problem(SHAPE, V, H).leaves()
    loss = linear_step_pref_loss(hidden, weight, layout, pairs, bias=bias, **options).loss
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    copy = first.clone()
    first.mul_(3)
    try:
        (second,) = torch.autograd.grad(loss, weight)
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        assert torch.equal(second, copy)


def test_gradients_accumulate_over_micro_batches():
    layout, pairs, options = units_batch()
    leaves = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64).leaves()
    single = linear_route(problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64), layout, pairs, **options)
    for _ in range(3):
        loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], **options).loss
        (loss / 3).backward()
    for t, g in zip(leaves, single[1:], strict=True):
        torch.testing.assert_close(t.grad, g, rtol=1e-12, atol=1e-15)


# ---- what enters, and what comes back


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


# ---- autocast


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


# ---- the weight's gradient: buffer and accumulator


@pytest.mark.parametrize("buffer_dtype, weight_dtype", [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64), (F32, F16)])
@pytest.mark.parametrize("rows", [10_000, 4])
def test_weight_grad_buffer(buffer_dtype, weight_dtype, rows):
    """Added to, in backward only, once per backward, times the upstream gradient; autograd sees no gradient of the
    weight."""
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=weight_dtype, weight_dtype=weight_dtype)
    plain = linear_route(p, layout, pairs, rows=rows, **options)
    start = torch.randn(V, H, generator=torch.Generator().manual_seed(9)).to(buffer_dtype)
    buffer = start.clone()
    hidden, weight, bias = p.leaves()
    loss = linear_step_pref_loss(
        hidden, weight, layout, pairs, bias=bias, weight_grad=buffer, chunk_bytes=budget(rows, p.dtype), **options
    ).loss
    assert torch.equal(buffer, start), "written before backward"
    (loss * 0.5).backward(retain_graph=True)
    once = buffer.clone()
    (loss * 0.5).backward()
    assert weight.grad is None
    rel = 4 * torch.finfo(min(buffer_dtype, weight_dtype, key=lambda d: d.itemsize)).eps
    size = max(1.0, plain[2].abs().max().item(), start.abs().max().item())
    assert (once.double() - start.double() - 0.5 * plain[2].double()).abs().max() <= rel * size
    assert (buffer.double() - start.double() - plain[2].double()).abs().max() <= 2 * rel * size
    torch.testing.assert_close(hidden.grad, plain[1])
    torch.testing.assert_close(bias.grad, plain[3])


def test_weight_grad_that_cannot_be_filled():
    layout, pairs, _ = units_batch()
    p = problem(SHAPE, V, H, bias=False)
    for buffer in (torch.zeros(V, H + 1), torch.zeros(V, H, dtype=torch.int64), torch.zeros(V, H, device="meta")):
        with pytest.raises((ValueError, TypeError), match="weight_grad"):
            linear_step_pref_loss(p.hidden, p.leaves()[1], layout, pairs, weight_grad=buffer)
    with pytest.raises(
        ValueError, match="weight_grad"
    ):  # a frozen weight: the buffer would stay as it is, without a word
        linear_step_pref_loss(p.leaves()[0], p.weight, layout, pairs, weight_grad=torch.zeros(V, H))


def test_accumulates_in_float32():
    """256 one-row chunks of bfloat16: accumulated in the weight's dtype the error grows with every addition."""
    layout = layout_of_lengths([128, 128], V)
    pairs = pairs_of(layout, (0, 1))
    p = problem((1, 257), V, H, bias=False, hidden_dtype=BF16, weight_dtype=BF16)
    p.hidden = p.hidden.abs()  # one sign, so that sums grow
    truth = truth_of(p, layout, pairs)[2]
    error = {
        dtype: errors(linear_route(p, layout, pairs, rows=1, accum_dtype=dtype)[2], truth)[1]
        for dtype in (None, F32, BF16)
    }
    assert error[None] == error[F32] < 0.5 * error[BF16]
    assert error[F32] <= 2 * torch.finfo(BF16).eps * truth.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e5m2, torch.complex64])
def test_accum_dtype_that_is_none(dtype):
    layout, pairs, _ = units_batch()
    p = problem(SHAPE, V, H)
    with pytest.raises((ValueError, TypeError), match="accum_dtype"):
        linear_step_pref_loss(*p.leaves()[:2], layout, pairs, accum_dtype=dtype)


# ---- nothing to do


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


# ---- edges of the field


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


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_second_derivative_is_refused(needs):
    layout, pairs, options = units_batch()
    p = problem(SHAPE, V, H)
    for fn in (
        lambda h, w, b: linear_step_pref_loss(h, w, layout, pairs, bias=b, **options).loss,
        lambda h, w, b: linear_step_logps(h, w, layout, bias=b).sums.square().sum(),
    ):
        leaves = p.leaves(needs)
        wanted = [t for t in leaves if t.requires_grad]
        with pytest.raises(RuntimeError, match="sspo_ext.*reference"):
            gradients = torch.autograd.grad(fn(*leaves), wanted, create_graph=True)
            sum(g.square().sum() for g in gradients).backward()
    leaves = p.leaves(needs)
    loss = linear_step_pref_loss(*leaves[:2], layout, pairs, bias=leaves[2], backend="reference", **options).loss
    gradients = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], create_graph=True)
    sum(g.square().sum() for g in gradients).backward()


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


# ---- step log-probs


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


def test_weight_grad_buffer_of_step_logps():
    layout, _, _ = units_batch()
    p = problem(SHAPE, V, H, hidden_dtype=F64, weight_dtype=F64)
    plain = p.leaves()
    linear_step_logps(*plain[:2], layout, bias=plain[2], chunk_bytes=budget(5, F64)).sums.sum().backward()
    leaves, buffer = p.leaves(), torch.ones(V, H, dtype=F64)
    sums = linear_step_logps(*leaves[:2], layout, bias=leaves[2], chunk_bytes=budget(5, F64), weight_grad=buffer).sums
    assert (buffer == 1).all()
    sums.sum().backward()
    assert leaves[1].grad is None
    torch.testing.assert_close(buffer - 1, plain[1].grad)


# ---- errors name the argument


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
