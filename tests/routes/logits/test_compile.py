# SPDX-License-Identifier: Apache-2.0
"""The private ops under torch.library's own checks, and every public function under torch.compile(fullgraph=True).

Mutations of sspo_ext/ops.py, each caught by the test named (on a copy of the package):
  fake: log-sum-exp in float32            test_opcheck_rows
  fake: one step too many                 test_opcheck_steps
  fake: gradient strided like the logits  test_opcheck_rows
  labels checked while compiling          test_labels_out_of_range_give_nan_when_unchecked
"""

import pytest
import torch
from helpers.batch import fused_backends, pack, random_batch, random_pairs
from helpers.opcheck import opcheck

from sspo_ext.backends import ops
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.losses.pref import step_pref_loss

COMPILERS = [
    pytest.param("aot_eager", False),
    pytest.param("aot_eager", True),
    pytest.param("inductor", False, marks=pytest.mark.slow),
    pytest.param("inductor", True, marks=pytest.mark.slow),
]


def row_arguments(batch, backend):
    layout = batch.layout
    logits = batch.logits
    tokens, lse = ops.token_logp_fwd(logits, layout.rows, layout.labels, 1.0, 0.0, backend)
    return layout, tokens, lse


def step_arguments(batch, backend, **values):
    layout = batch.layout
    pairs = random_pairs(layout, 0, 5, **values)
    _, tokens, _ = row_arguments(batch, backend)
    weights = None if layout.weights is None else layout.weights.to(tokens.dtype)
    ref, scale = torch.randn(layout.num_steps, dtype=tokens.dtype), torch.tensor(0.2, dtype=tokens.dtype)
    return (
        tokens, weights, layout.step_offsets, ref, pairs.index, pairs.adj_offsets, pairs.adj_pairs, pairs.weights,
        pairs.margins, pairs.soft_labels, scale, "sigmoid", [0.1], 1.0, backend,
    )  # fmt: skip


def permuted(logits):
    """The same values with time outermost in memory."""
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("arrange", [torch.clone, permuted], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_rows(backend, arrange, dtype):
    batch = random_batch(0, B=2, T=7, dtype=dtype)
    batch.logits = arrange(batch.logits)
    layout, tokens, lse = row_arguments(batch, backend)
    coef, upstream = torch.randn_like(tokens), torch.tensor(2.0)
    opcheck(ops.token_logp_fwd, (batch.logits, layout.rows, layout.labels, 0.7, 5.0, backend), dtype)
    for up in (upstream, None):
        args = (batch.logits, layout.row_of, layout.labels, lse, coef, up, 1.0, 0.0, backend)
        opcheck(ops.token_logp_bwd, args, dtype)
        opcheck(ops.token_logp_bwd_, (batch.logits.clone(), *args[1:]), dtype)


@pytest.mark.parametrize("given", [True, False])
def test_opcheck_steps(backend, given):
    values = {"weights": torch.rand(5), "margins": torch.rand(5), "soft_labels": torch.rand(5)} if given else {}
    opcheck(ops.step_loss_fwd, step_arguments(random_batch(0, B=2, T=7, weighted=given), backend, **values))


def test_opcheck_nothing(backend):
    batch = random_batch(0, B=2, T=7)
    batch.labels.fill_(-100)
    batch.step_ids.fill_(-1)
    layout, tokens, lse = row_arguments(batch, backend)
    opcheck(ops.token_logp_fwd, (batch.logits, layout.rows, layout.labels, 1.0, 0.0, backend))
    opcheck(ops.token_logp_bwd, (batch.logits, layout.row_of, layout.labels, lse, tokens, None, 1.0, 0.0, backend))


@pytest.mark.parametrize("arrange", [torch.clone, permuted], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fakes_describe_what_the_kernels_return(backend, arrange, dtype):
    """Shapes, dtypes and strides, with permuted logits too: compiled code trusts them."""
    if backend not in fused_backends(dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = random_batch(0, dtype=dtype, weighted=True)
    batch.logits = arrange(batch.logits)
    layout, tokens, lse = row_arguments(batch, backend)
    calls = [
        (ops.token_logp_fwd, (batch.logits, layout.rows, layout.labels, 1.0, 0.0, backend)),
        (ops.token_logp_bwd, (batch.logits, layout.row_of, layout.labels, lse, tokens, None, 1.0, 0.0, backend)),
        (ops.step_loss_fwd, step_arguments(batch, backend)),
    ]
    for op, args in calls:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device), op


def test_ops_are_bound_once_and_private():
    import sspo_ext

    assert all(
        isinstance(getattr(ops, n), torch._ops.OpOverload)
        for n in ("token_logp_fwd", "token_logp_bwd", "token_logp_bwd_", "step_loss_fwd")
    )
    assert not any("token_logp" in name or "_fwd" in name for name in sspo_ext.__all__)


def test_the_inplace_op_moves_the_version_on(backend):
    """The kernels write raw memory: without it, autograd could not see that saved logits are gone."""
    batch = random_batch(0)
    layout, tokens, lse = row_arguments(batch, backend)
    before = batch.logits._version
    ops.token_logp_bwd_(batch.logits, layout.row_of, layout.labels, lse, tokens, None, 1.0, 0.0, backend)
    assert batch.logits._version > before


# ---- torch.compile


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_and_eager(fn, batch, compiler, *args):
    results = []
    for call in (torch.compile(fn, fullgraph=True, backend=compiler), fn):
        leaf = batch.logits.detach().clone().requires_grad_()
        out = call(leaf * 1, *args)
        out[0].backward()
        results.append((*[o.detach() for o in out], leaf.grad))
    return zip(*results, strict=True)


@pytest.mark.parametrize(("compiler", "inplace"), COMPILERS)
def test_compiled_loss_equals_eager_bitwise(backend, compiler, inplace):
    batch = random_batch(1, weighted=True)
    layout = batch.layout
    pairs = random_pairs(layout, 0, 6, weights=torch.rand(6), margins=torch.rand(6))
    ref = torch.randn(layout.num_steps)

    def loss(logits, layout, pairs, ref):
        out = step_pref_loss(logits, layout, pairs, ref=ref, backend=backend, temperature=0.9, inplace_backward=inplace)
        return out.loss * 3, out.step_logps, out.pair_losses, out.metrics["rewards/margins"]

    for got, want in compiled_and_eager(loss, batch, compiler, layout, pairs, ref):
        assert torch.equal(got, want)
    assert graphs() == 1


def test_compiled_step_logps_equal_eager(backend):
    batch = random_batch(1)

    def fn(logits, layout):
        out = step_logps(logits, layout, backend=backend)
        return (out.sums * out.counts).sum() + out.tokens.square().sum(), out.means

    for (got, want), what in zip(
        compiled_and_eager(fn, batch, "aot_eager", batch.layout), ("value", "means", "gradient"), strict=True
    ):
        assert torch.equal(got, want), what


# hinge compiles in test_options_that_change_compile
@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("hinge", marks=pytest.mark.slow), "ipo", "simpo"])
def test_every_loss_compiles(loss_type):
    """Also what takes another way: auto, packed, num_items as a tensor, a reference by token, weights, no gradient."""
    batch = random_batch(3)
    logits, layout, _, _ = pack(batch)
    pairs = layout.pair_by_index()
    ref = None if loss_type == "simpo" else step_logps(logits * 0.5, layout)
    n, weights = torch.tensor(7), torch.rand(layout.num_rows) + 0.5

    def fn(logits):
        return step_pref_loss(
            logits, layout, pairs, ref=ref, loss_type=loss_type, num_items=n, token_weights=weights
        ).loss

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    assert torch.equal(compiled(leaf), fn(leaf))
    with torch.no_grad():
        assert torch.equal(compiled(leaf), fn(leaf))


def test_the_reference_compiles():
    batch = random_batch(3)
    layout, pairs = batch.layout, batch.layout.pair_by_index()

    def fn(logits):
        return (step_pref_loss(logits, layout, pairs, backend="reference").loss,)

    for got, want in compiled_and_eager(fn, batch, "aot_eager"):
        torch.testing.assert_close(got, want)


def test_a_reference_of_step_sums_compiles_where_steps_have_one_row_each():
    ids = torch.tensor([[-1, 0, 1, 2], [-1, 0, 1, 2]])
    layout = StepLayout.from_step_ids(torch.ones_like(ids), ids)
    logits, ref, pairs = torch.randn(2, 4, 5), torch.randn(6), layout.pair_by_index()

    def fn(logits, ref):
        return step_pref_loss(logits, layout, pairs, ref=ref).loss

    assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(logits, ref), fn(logits, ref))


def test_no_recompiles_over_batches():
    """Batches of other lengths, rows, steps and pairs: the first graph, the one with dynamic sizes, and no more.

    torch 2.6 guards on the place of the largest label too, and makes constants of 0 and 1.
    """

    def loss(logits, layout, pairs, ref):
        return step_pref_loss(logits, layout, pairs, ref=ref).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    shapes = set()
    for seed, (B, T) in enumerate([(4, 12), (6, 17), (2, 30), (8, 9), (4, 25), (6, 40), (10, 33)]):
        batch = random_batch(seed, B, T)
        layout = batch.layout
        pairs = layout.pair_by_index()
        shapes.add((B, T, layout.num_rows, layout.num_steps, pairs.num_pairs))
        leaf = batch.logits.clone().requires_grad_()
        ref = torch.randn(layout.num_steps)
        got = compiled(leaf, layout, pairs, ref)
        got.backward()
        assert torch.equal(got.detach(), loss(batch.logits, layout, pairs, ref))
    assert len(shapes) == 7
    most = 4 if torch.__version__.startswith("2.6.") else 2
    assert graphs() <= most, f"{graphs()} graphs for {len(shapes)} batch shapes"


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_options_that_change_compile(dynamic):
    """A schedule: torch.compile makes a symbol of a number that changed, or of every one with `dynamic`."""
    batch = random_batch(1)
    layout, pairs = batch.layout, batch.layout.pair_by_index()
    ref, advantages = torch.randn(layout.num_steps), torch.randn(layout.num_steps)
    old = step_logps(batch.logits * 0.9, layout).tokens
    heads = ["sigmoid", "hinge"]

    def losses(logits, beta, weight, epsilon):
        pref = step_pref_loss(
            logits, layout, pairs, ref=ref, loss_type=heads, loss_weights=[1.0, weight], beta=beta, label_smoothing=beta
        )
        return pref.loss, step_policy_loss(logits, layout, advantages, old=old, loss_type="ppo", epsilon=epsilon).loss

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for numbers in ((0.1, 0.5, 0.01), (0.2, 0.6, 0.02)):
        assert compiled(batch.logits, *numbers) == losses(batch.logits, *numbers)


def test_labels_out_of_range_give_nan_when_unchecked(backend):
    """Compiled, labels are not compared with V (it would recompile for every batch): NaN, and no wild read."""
    ids = torch.tensor([[-1, 0, 0, 0]])
    layout = StepLayout.from_step_ids(torch.tensor([[0, 1, 10**9, 2]]), ids)
    logits = torch.randn(1, 4, 5)
    tokens = torch.compile(
        lambda x: step_logps(x, layout, backend=backend).tokens, fullgraph=True, backend="aot_eager"
    )(logits)
    assert tokens.isnan().tolist() == [False, True, False]
