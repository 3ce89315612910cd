# SPDX-License-Identifier: Apache-2.0
"""Both routes on a tree of sequences: accuracy in each dtype, products, bits, compiled graphs, many branches.

Mutations of sspo_ext/routes, each caught by the test named (on a copy of the package):
  a shared row once for each sequence             test_products
  coefficients of shared rows summed in bfloat16  test_logits_rule
  branches of hidden gradients added in bfloat16  test_a_thousand_branches
  labels of branches counted, not summed          test_a_thousand_branches
  a gather where nothing is shared                test_nothing_shared_costs_nothing
"""

import pytest
import torch
from helpers.batch import dtypes_of
from helpers.linear import assert_linear_rule, gemm_flops, problem
from helpers.tree import TreeBatch, losses, pairs_of, random_tree
from helpers.truth import assert_fp64_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.layout.tree import TokenTree
from sspo_ext.losses import policy_plan, pref_plan
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import linear_step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
V, H = 37, 8


def run(loss, batch: TreeBatch, dtype, backend: str, plain: bool, **more):
    leaf = batch.logits.detach().to(dtype, copy=True).requires_grad_()
    if plain:
        value = loss(batch.unshared(leaf), batch.plain, backend=backend, **more)
    else:
        value = loss(leaf * 1, batch.layout, backend=backend, **more)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["pair", "policy", "entropy", "logps"])
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_rule(backend, name, inplace):
    """Twice torch's own error at most, where torch adds up the gradients of the gathered rows in the logits' dtype."""
    for seed in range(2 if backend == "triton" else 6):
        for dtype in (d for d in dtypes_of(backend) if d != F64):
            batch = random_tree(seed, B=4 if backend == "triton" else 7, V=V, weighted=True, dtype=dtype)
            loss = losses(batch)[name]
            value, grad = run(loss, batch, dtype, backend, False, inplace_backward=inplace)
            same, same_grad = run(loss, batch, dtype, "reference", True)
            truth, truth_grad = run(loss, batch, F64, "reference", True)
            assert grad.dtype == dtype and (grad.reshape(-1, V)[batch.layout.row_of < 0] == 0).all()
            assert_fp64_rule(value, same, truth, batch.layout.num_rows, f"{name}, {dtype}")
            assert_fp64_rule(grad, same_grad, truth_grad, V, f"gradient of {name}, {dtype}")


@pytest.mark.parametrize("hidden_dtype", [F32, BF16, torch.float16, F64])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize("rows", [4, 10_000])
def test_linear_rule(backend, hidden_dtype, needs, rows):
    for seed in range(4):
        batch = random_tree(seed, V=V, weighted=True)
        p = problem(batch.tree.shape, V, H, seed=seed, hidden_dtype=hidden_dtype, weight_dtype=hidden_dtype)
        pairs, results = pairs_of(batch.layout), []
        for kind in ("ours", "torch", "truth"):
            leaves = p.leaves(needs, F64 if kind == "truth" else None)
            hidden, weight, bias = leaves
            if kind == "ours":
                budget = {"chunk_bytes": rows * V * hidden_dtype.itemsize}
                loss = linear_step_pref_loss(
                    hidden, weight, batch.layout, pairs, bias=bias, reference_free=True, backend=backend, **budget
                ).loss
            else:
                logits = torch.nn.functional.linear(hidden, weight, bias)
                loss = step_pref_loss(
                    batch.unshared(logits), batch.plain, pairs, reference_free=True, backend="reference"
                ).loss
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for name, ours, same, truth in zip(("loss", "hidden", "weight", "bias"), *results, strict=False):
            assert_linear_rule(f"{name}, {seed}", ours, same, truth, hidden_dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["pair", "policy", "entropy", "frozen"])
def test_linear_kernels(backend, name):
    """Each kernel of the route in chunks of 4 rows, in float32; interpreted ones too."""
    batch = random_tree(1, V=V, weighted=True)
    layout, p = batch.layout, problem(batch.tree.shape, V, H)
    assert layout.tree_rows.shared is not None and layout.tree_rows.branches is not None
    advantages = torch.linspace(-1, 2, layout.num_steps)
    old = linear_step_logps(p.hidden, p.weight, layout, bias=p.bias, backend="reference").tokens + 0.05
    pairs, results = pairs_of(layout), []
    for kind, dtype in (("ours", F32), ("torch", F32), ("truth", F64)):
        leaves = p.leaves((1, 0, 0) if name == "frozen" else (1, 1, 1), dtype)
        hidden, own = (leaves[0], layout) if kind == "ours" else (batch.unshared(leaves[0]), batch.plain)
        options = {"bias": leaves[2], "chunk_bytes": 4 * V * 4, "backend": backend if kind == "ours" else "reference"}
        if name in ("pair", "frozen"):
            loss = linear_step_pref_loss(hidden, leaves[1], own, pairs, reference_free=True, **options).loss
        else:
            more = {"loss_type": "ppo", "old": old, "importance_sampling_level": "step"}
            more |= {"entropy_coef": 0.1, "kl_coef": 0.1, "ref": old} if name == "entropy" else {}
            loss = linear_step_policy_loss(hidden, leaves[1], own, advantages, **more, **options).loss
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for n, three in enumerate(zip(*results, strict=True)):
        assert_linear_rule(f"{name}, {n}", *three, F32)


# ---- products


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 0, 0)])
def test_products(needs):
    """A row that sequences share enters as many products as any other: three with a trained head."""
    batch = random_tree(0, V=V)
    layout = batch.layout
    unique, tokens = layout.rows.shape[0], layout.num_rows
    assert unique < tokens
    p = problem(batch.tree.shape, V, H)
    hidden, weight, _ = p.leaves(needs)
    every = {(1, 1, 1): 3, (1, 0, 0): 2, (0, 0, 0): 1}[needs]
    pairs, sizes = pairs_of(layout, count=40), {"vocab": V, "hidden": H}
    wants = {"hidden_gradient": bool(needs[0]), "weight_gradient": bool(needs[1])}

    def pair():
        linear_step_pref_loss(hidden, weight, layout, pairs, reference_free=True)

    def policy():
        linear_step_policy_loss(hidden, weight, layout, torch.ones(layout.num_steps))

    plan = pref_plan(layout, pairs, **sizes, **wants)
    assert plan.num_rows == unique and {g.kind for g in plan.groups} <= {"complete", "frozen", "logps"}
    assert gemm_flops(pair) == plan.flops == 2 * V * H * every * unique
    if needs[1]:
        plan = policy_plan(layout, **sizes, **wants)
        assert gemm_flops(policy) == plan.flops == 2 * V * H * every * unique
        plan = policy_plan(layout, importance_sampling_level="sequence", chunk_bytes=unique * V, **sizes, **wants)
        assert plan.num_rows == unique and "rows" in str(plan)


@pytest.mark.parametrize("level", ["token", "step"])
@pytest.mark.parametrize("skip", [False, True])
def test_products_of_idle_rows(level, skip):
    """A row whose tokens all have an advantage of 0 enters one product or none; one that others have too, three."""
    batch = random_tree(0, V=V)
    layout = batch.layout
    advantages = torch.ones(layout.num_steps)
    advantages[::2] = 0
    idle = (advantages == 0)[layout.step_of_row]
    busy = layout.tree_rows.shared.row[~idle].unique()
    assert 0 < len(busy) < len(layout.rows) and torch.isin(layout.tree_rows.shared.row[idle], busy).any()
    hidden, weight, _ = problem(batch.tree.shape, V, H).leaves()
    options = {"importance_sampling_level": level, "skip_zero_advantages": skip}
    plan = policy_plan(layout, advantages=advantages, vocab=V, hidden=H, **options)

    def policy():
        linear_step_policy_loss(hidden, weight, layout, advantages, loss_type="ppo", **options)

    rows = 3 * len(busy) + (0 if skip else len(layout.rows) - len(busy))
    assert gemm_flops(policy) == plan.flops == 2 * V * H * rows


def test_batch_invariant(backend):
    """With products of one shape a tree's log-probs are the padded batch's, bit for bit."""
    batch = random_tree(2, V=V)
    p = problem(batch.tree.shape, V, H)
    options = {"bias": p.bias, "batch_invariant": True, "backend": backend}
    ours = linear_step_logps(p.hidden, p.weight, batch.layout, **options)
    theirs = linear_step_logps(batch.unshared(p.hidden), p.weight, batch.plain, **options)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.sums, theirs.sums)


def test_pairs_of_one_tree_are_a_unit():
    """Pairs whose steps share a scored row are worked on together; others are not."""
    tokens = [torch.tensor(s) for s in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [8, 2, 3], [8, 2, 4])]
    ids = [torch.tensor([-1, 0, 0, 1]), torch.tensor([-1, 0, 0, 1]), torch.tensor([-1, 0, 0, 1])]
    ids += [torch.tensor([-1, -1, 0])] * 2
    layout = StepLayout.from_tree(TokenTree.from_sequences(tokens), tokens, ids)
    # steps 0 and 2 share two rows, and step 4 shares one with both: pairs (0, 3), (2, 5) and (4, 1) are one unit
    pairs = StepPairs.from_index(layout, torch.tensor([[0, 3], [2, 5], [4, 1], [6, 7]]))
    plan = pref_plan(layout, pairs, vocab=V, hidden=H, chunk_bytes=V * 4 * 7)
    assert [(g.kind, g.end - g.start, sorted(g.steps.tolist())) for g in plan.groups] == [
        ("complete", 6, [0, 1, 2, 3, 4, 5]), ("complete", 2, [6, 7]),
    ]  # fmt: skip


# ---- invariances


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 60), loss_type=st.sampled_from(["sigmoid", "ipo", "simpo"]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_trees(seed, budget, loss_type):
    """Logits and linear route, any chunks, any split of the trees: the padded batch's loss and gradients."""
    split = None if seed % 2 else 16
    batch = random_tree(seed, B=2 + seed % 6, V=V, weighted=seed % 3 == 0, dtype=F64, max_tokens=split)
    if batch.layout.num_steps < 2:
        return
    p = problem(batch.tree.shape, V, H, seed=seed, hidden_dtype=F64, weight_dtype=F64)
    pairs, options = pairs_of(batch.layout, seed), {"loss_type": loss_type, "reference_free": True}
    ours, theirs, logits = p.leaves(), p.leaves(), torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    linear = linear_step_pref_loss(
        ours[0], ours[1], batch.layout, pairs, bias=ours[2], chunk_bytes=budget * V * 8, **options
    ).loss
    whole = batch.unshared(torch.nn.functional.linear(*theirs))
    want = step_pref_loss(whole, batch.plain, pairs, backend="reference", **options).loss
    of_logits = step_pref_loss(logits, batch.layout, pairs, **options).loss
    linear.backward()
    want.backward()
    every = zip((linear, of_logits, *(t.grad for t in ours)), (want, want, *(t.grad for t in theirs)), strict=True)
    for got, truth in every:
        assert (got - truth).abs().max() <= 1e-12 * max(1.0, truth.abs().max().item())


def test_same_bits_again(backend):
    """Twice, and with another number of threads: sums over sequences have an order."""
    batch = random_tree(5, B=30, V=V)
    loss = losses(batch)["entropy"]
    first = run(loss, batch, F32, backend, False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = run(loss, batch, F32, backend, False)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradient_accumulation(backend):
    """Two trees with the number of pairs of both give the sum of one call on each, divided by both."""
    parts = [random_tree(seed, V=V, dtype=F64) for seed in (0, 1)]
    pairs = [pairs_of(part.layout, n) for n, part in enumerate(parts)]
    total = sum(p.num_valid for p in pairs)
    for part, own in zip(parts, pairs, strict=True):
        grads = []
        for plain, name in ((False, backend), (True, "reference")):
            leaf = part.logits.clone().requires_grad_()
            logits, layout = (part.unshared(leaf), part.plain) if plain else (leaf * 1, part.layout)
            out = step_pref_loss(logits, layout, own, reference_free=True, num_items=total, backend=name)
            out.loss.backward()
            grads.append((out.loss.detach(), leaf.grad))
        assert all((a - b).abs().max() <= 1e-13 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_thousand_branches(backend, dtype):
    """A token with a thousand different next tokens, and a path that a thousand sequences score."""
    branches, vocab = 1000, 1100
    tokens = [torch.tensor([1, 2, 3, 4 + b]) for b in range(branches)]
    ids = [torch.tensor([-1, 0, 0, 1])] * branches
    layout = StepLayout.from_tree(TokenTree.from_sequences(tokens), tokens, ids)
    plain = StepLayout.from_step_ids(torch.stack(tokens), torch.stack(ids))
    g = torch.Generator().manual_seed(0)
    place = layout.tree_rows.places.new_tensor([[0, 1, 2, 3]]).expand(branches, 4)  # the last logits are not read
    hidden = torch.randn(*layout.shape, H, generator=g).to(dtype)
    weight = (torch.randn(vocab, H, generator=g) * 0.5).to(dtype)
    factors = torch.randn(layout.num_rows, generator=g)
    results = []
    for kind, head in [(k, h) for k in ("ours", "torch", "truth") for h in (True, False)]:
        to = F64 if kind == "truth" else dtype
        leaves = [hidden.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_(head)]
        if kind == "ours":
            tokens_ = linear_step_logps(*leaves, layout, backend=backend).tokens
        else:
            logits = (leaves[0] @ leaves[1].T).flatten(0, 1)[place]
            tokens_ = step_logps(logits, plain, backend="reference").tokens
        (tokens_ * factors.to(tokens_.dtype)).sum().backward()
        results.append([tokens_.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for ours, same, truth in zip(results[:2], results[2:4], results[4:], strict=True):
        for n, three in enumerate(zip(ours, same, truth, strict=True)):
            assert_linear_rule(f"value {n}", *three, dtype)


class Names(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_shared_costs_nothing():
    """A tree whose sequences share no scored token dispatches what the padded batch does."""
    tokens = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 5, 6, 7])]
    ids = [torch.tensor([-1, -1, 0, 1])] * 2
    tree = TokenTree.from_sequences(tokens)
    layouts = [StepLayout.from_tree(tree, tokens, ids), StepLayout.from_step_ids(torch.stack(tokens), torch.stack(ids))]
    assert tree.sharing > 1 and layouts[0].num_rows == layouts[1].num_rows
    names = []
    for layout in layouts:
        leaf = torch.randn(*layout.shape, V).requires_grad_()
        pairs = layout.pair_by_index()
        with Names() as mode:
            step_pref_loss(leaf, layout, pairs, reference_free=True).loss.backward()
        names.append(mode.names)
    assert names[0] == names[1] and len(names[0]) > 3
