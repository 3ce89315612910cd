# SPDX-License-Identifier: Apache-2.0
"""Layouts with kept tokens: both routes, every loss, against logits that are -inf outside the sets.

Mutations, each caught by the test named:
  the sets in the layout's order beside a plan of another order   test_rows_in_another_order
  values not written back; rows of the whole vocabulary emptied   test_losses_and_gradients
  the reference of a KL over the whole vocabulary                 test_reductions
  the first token's set of a position, not the union              test_trees
  the sets of all rows beside busy rows alone                     test_idle_rows
"""

from functools import partial

import pytest
import torch
from helpers.batch import dtypes_of, random_pairs
from helpers.linear import gemm_flops, peak_bytes
from helpers.policy import VARIANTS, with_old
from helpers.policy import problem as policy_batch
from helpers.tree import random_tree

from sspo_ext import (
    StepLayout,
    linear_step_logps,
    linear_step_policy_loss,
    linear_step_pref_loss,
    step_logps,
    step_policy_loss,
    step_pref_loss,
)
from sspo_ext.losses import policy_loss
from sspo_ext.routes.kept import KeptRows

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
V, H = 11, 5


def some_sets(layout, seed=0, whole=0.2, vocab=V):
    """For each scored token None, or a random set with its label: of one token, of nearly all, with doubles."""
    g = torch.Generator().manual_seed(seed)
    labels = layout.labels if layout.tree_rows is None or layout.tree_rows.shared is None else (
        layout.labels[layout.tree_rows.shared.host_row]
    )  # fmt: skip
    sets = []
    for label in labels.tolist():
        share = torch.rand((), generator=g).item()
        ids = torch.nonzero(torch.rand(vocab, generator=g) < share)[:, 0].tolist()
        kept = [*ids, label, label]
        sets.append(None if torch.rand((), generator=g) < whole else torch.tensor(kept) if len(ids) % 2 else kept)
    return sets


def outside(sets, places, shape, vocab=V):
    """(B, T, V) bool by a loop: what the logits that predict the tokens at `places` leave out."""
    mask = torch.zeros(shape[0] * shape[1], vocab, dtype=torch.bool)
    for given, place in zip(sets, places.tolist(), strict=True):
        if given is not None:
            mask[place - 1] = True
            mask[place - 1, torch.as_tensor(given)] = False
    return mask.view(*shape, vocab)


def gradients(fn, *leaves, upstream=1.7):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = fn(*leaves)
    (value * upstream).backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def loss_of(name, batch, layout, advantages, old, ref, **more):
    """loss(inputs..., layout) of both routes."""
    if name == "pair":
        pairs = random_pairs(layout, 3)
        options = {"reference_free": True, "loss_type": "simpo", **more}
        return (
            lambda z, lay, **o: step_pref_loss(z, lay, pairs, **options, **o).loss,
            lambda h, w, b, lay, **o: linear_step_pref_loss(h, w, lay, pairs, bias=b, **options, **o).loss,
        )
    if name == "logps":
        by = torch.linspace(-1, 1, layout.num_rows, dtype=F64)
        return (
            lambda z, lay, **o: (step_logps(z, lay, **more, **o).tokens * by).sum(),
            lambda h, w, b, lay, **o: (linear_step_logps(h, w, lay, bias=b, **more, **o).tokens * by).sum(),
        )
    options = {**with_old(VARIANTS[name], old), "ref": ref, "kl_coef": 0.3, "entropy_coef": 0.1, **more}
    return (
        lambda z, lay, **o: step_policy_loss(z, lay, advantages, **options, **o).loss,
        lambda h, w, b, lay, **o: linear_step_policy_loss(h, w, lay, advantages, bias=b, **options, **o).loss,
    )


def close(found, want, size):
    for a, b in zip(found, want, strict=False):
        assert (a.double() - b.double()).abs().max() <= size * b.double().abs().max()


def linear_problem(layout, dtype=F64):
    g = torch.Generator().manual_seed(5)
    shapes = ((*layout.shape, H), (V, H), (V,))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", ["pair", "logps", *VARIANTS])
def test_losses_and_gradients(name):
    """Temperature, weights, chunks of two rows: the loss and each gradient are those of -inf outside the sets."""
    batch, layout, advantages, *_ = policy_batch(seed=3, weighted=True, V=V)
    sets = some_sets(layout)
    narrow, mask = layout.with_kept_tokens(sets), outside(sets, layout.places, layout.shape)
    hidden, weight, bias = linear_problem(layout)
    logits = hidden @ weight.t() + bias
    tokens = step_logps(logits.masked_fill(mask, -torch.inf), layout, temperature=0.7, backend="reference").tokens
    old, ref = tokens + 0.2 * torch.randn(len(tokens)), tokens + 0.3 * torch.randn(len(tokens))
    from_logits, from_hidden = loss_of(name, batch, layout, advantages, old, ref, temperature=0.7)

    def truth(z):
        return from_logits(z.masked_fill(mask, -torch.inf), layout, backend="reference")

    want = gradients(lambda h, w, b: truth(h @ w.t() + b), hidden, weight, bias)
    at_logits = gradients(truth, logits)
    for backend in ("reference", "cpu"):

        def loss(*given, route=from_logits, **more):
            return route(*given, narrow, **more)

        close(gradients(partial(loss, backend=backend), logits), at_logits, 1e-11)
        for rows in (2, 1000):
            linear = partial(loss, route=from_hidden, backend=backend, chunk_bytes=rows * V * 8)
            close(gradients(linear, hidden, weight, bias), want, 1e-11)
            close(gradients(lambda h, linear=linear: linear(h, weight, bias), hidden), want, 1e-11)  # a frozen head
    plain = gradients(lambda z: from_logits(z, layout, backend="cpu"), logits)[1]
    assert not torch.allclose(plain, at_logits[1], atol=1e-3)  # the sets matter


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["ppo", "logps", "pair"])
def test_every_backend_and_dtype(backend, name):
    batch, layout, advantages, old, ref = policy_batch(seed=4, B=2, T=9, V=V)
    sets = some_sets(layout, seed=1)
    narrow, mask = layout.with_kept_tokens(sets), outside(sets, layout.places, layout.shape)
    for dtype in dtypes_of(backend):
        acc = F64 if dtype == F64 else F32
        given = loss_of(name, batch, layout, advantages.to(acc), old.to(acc), ref.to(acc))

        def cut(z, given=given, **more):
            return given[0](z.masked_fill(mask, -torch.inf), layout, **more)

        def whole(*leaves, route=given[0]):
            return route(*leaves, narrow, backend=backend)

        hidden, weight, bias = linear_problem(layout, dtype)
        logits = (hidden.double() @ weight.double().t()).to(dtype)
        same = gradients(partial(cut, backend=backend), logits)
        found = gradients(whole, logits)
        assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])  # the kernels see the same numbers
        want = gradients(
            lambda h, w, b, cut=cut: cut(h.double() @ w.double().t() + b.double(), backend="reference"),
            hidden, weight, bias,
        )  # fmt: skip
        close(
            gradients(partial(whole, route=given[1]), hidden, weight, bias),
            want,
            {F64: 1e-12, F32: 1e-5}.get(dtype, 0.05),
        )


def test_reductions():
    """Entropy, sum of squares and the KL from a reference are over the kept tokens, the reference's too."""
    batch, layout, *_ = policy_batch(seed=3, V=V)
    sets = some_sets(layout)
    narrow, mask = layout.with_kept_tokens(sets), outside(sets, layout.places, layout.shape)
    g = torch.Generator().manual_seed(5)
    hidden, other = (torch.randn(*layout.shape, H, generator=g, dtype=F64) for _ in range(2))
    weight = torch.randn(V, H, generator=g, dtype=F64)
    cut = {name: (x @ weight.t()).masked_fill(mask, -torch.inf) for name, x in (("p", hidden), ("q", other))}
    wants = {"entropy": True, "sum_p2": True}
    want = step_logps(cut["p"], layout, kl_ref_logits=cut["q"], backend="reference", **wants)
    for backend in ("reference", "cpu"):
        for found in (
            step_logps(hidden @ weight.t(), narrow, kl_ref_logits=other @ weight.t(), backend=backend, **wants),
            linear_step_logps(hidden, weight, narrow, kl_ref_hidden=other, backend=backend, chunk_bytes=2 * V * 8,
                              **wants),
        ):  # fmt: skip
            for name in ("tokens", "sums", "entropy", "sum_p2", "kl"):
                assert torch.allclose(getattr(found, name), getattr(want, name), rtol=1e-11, atol=1e-13), name
    assert want.kl.isfinite().all()


def test_idle_rows():
    """Steps of advantage 0 are left out of the chunks with gradients; the sets follow their rows."""
    batch, layout, advantages, old, ref = policy_batch(seed=3, V=V)
    sets = some_sets(layout)
    narrow, mask = layout.with_kept_tokens(sets), outside(sets, layout.places, layout.shape)
    advantages = advantages * (torch.arange(len(advantages)) % 3 != 0)
    hidden = torch.randn(*layout.shape, H, generator=torch.Generator().manual_seed(5), dtype=F64)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(6), dtype=F64)

    def truth(h, w):
        return step_policy_loss((h @ w.t()).masked_fill(mask, -torch.inf), layout, advantages, backend="reference").loss

    want = gradients(truth, hidden, weight)
    for skip in (False, True):
        out = []

        def loss(h, w, skip=skip, out=out):
            out.append(linear_step_policy_loss(h, w, narrow, advantages, skip_zero_advantages=skip))
            return out[0].loss

        for a, b in zip(gradients(loss, hidden, weight), want, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
        tokens = step_logps((hidden @ weight.t()).masked_fill(mask, -torch.inf), layout, backend="reference").tokens
        known = ~out[0].tokens.isnan()
        assert known.all() != skip and torch.allclose(out[0].tokens[known], tokens[known])


@pytest.mark.parametrize("route", ["logits", "linear"])
def test_trees(route):
    """Tokens at one position share the union of their sets; the rest is as in a padded batch."""
    for seed in range(6):
        batch = random_tree(seed, V=V, dtype=F64)
        layout, plain = batch.layout, batch.plain
        sets = some_sets(layout, seed)
        tree = batch.layout.tree_rows
        row = torch.arange(layout.num_rows) if tree.shared is None else tree.shared.host_row
        position = tree.host_rows[row].tolist()
        union: dict[int, set | None] = {}
        for at, given in zip(position, sets, strict=True):
            before = union.get(at, set())
            union[at] = None if given is None or before is None else before | {int(i) for i in given}
        mask = outside([None if union[at] is None else list(union[at]) for at in position], plain.places, plain.shape)
        narrow = layout.with_kept_tokens(sets)
        advantages = torch.randn(layout.num_steps, generator=torch.Generator().manual_seed(seed), dtype=F64)
        hidden = torch.randn(*layout.shape, H, generator=torch.Generator().manual_seed(5), dtype=F64)
        weight = torch.randn(V, H, generator=torch.Generator().manual_seed(6), dtype=F64)

        def truth(h, w, batch=batch, mask=mask, advantages=advantages):
            logits = batch.unshared(h @ w.t()).masked_fill(mask, -torch.inf)
            return step_policy_loss(logits, batch.plain, advantages, backend="reference", entropy_coef=0.1).loss

        def loss(h, w, narrow=narrow, advantages=advantages):
            if route == "logits":
                return step_policy_loss(h @ w.t(), narrow, advantages, entropy_coef=0.1).loss
            more = {"entropy_coef": 0.1, "chunk_bytes": 3 * V * 8}
            return linear_step_policy_loss(h, w, narrow, advantages, **more).loss

        for a, b in zip(gradients(loss, hidden, weight), gradients(truth, hidden, weight), strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_all_tokens_are_nothing_new():
    """None for every token, or every token by name, gives the bits of a layout without sets."""
    batch, layout, advantages, *_ = policy_batch(seed=3, V=V, dtype=F32)
    plain = gradients(lambda z: step_policy_loss(z, layout, advantages).loss, batch.logits)
    for given in (None, range(V)):
        narrow = layout.with_kept_tokens([None if given is None else list(given)] * layout.num_rows)
        found = gradients(lambda z, narrow=narrow: step_policy_loss(z, narrow, advantages).loss, batch.logits)
        assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


def test_the_linear_route_stores_no_logits_and_adds_no_product():
    """Peak memory is that of a layout without sets, and the sets; the products are the same."""
    vocab, length, most = 3001, 257, 20
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (1, length), generator=g)
    layout = StepLayout.from_step_ids(labels, torch.arange(length)[None])
    sets = [[label, *torch.randint(0, vocab, (most - 1,), generator=g).tolist()] for label in layout.labels.tolist()]
    advantages, bytes_, flops = torch.randn(layout.num_steps), {}, {}
    hidden, weight, _ = (x.float().requires_grad_() for x in linear_problem(layout))
    weight = torch.randn(vocab, H, requires_grad=True)
    for name, lay in (("plain", layout), ("narrow", layout.with_kept_tokens(sets))):

        def update(lay=lay):
            loss = linear_step_policy_loss(hidden, weight, lay, advantages, chunk_bytes=32 * vocab * 4).loss
            return torch.autograd.grad(loss, (hidden, weight))

        bytes_[name], flops[name] = peak_bytes(update), gemm_flops(update)
    assert flops["plain"] == flops["narrow"]
    assert bytes_["narrow"] - bytes_["plain"] < 4 * most * length * 8 < (length - 1) * vocab * 4 / 4


def test_rows_in_another_order():
    """A plan may take rows in any order: each chunk's sets are those of its rows."""
    _, layout, *_ = policy_batch(seed=3, V=V)
    sets = some_sets(layout)
    kept = layout.with_kept_tokens(sets).kept
    order = torch.randperm(layout.num_rows, generator=torch.Generator().manual_seed(1))
    rows = KeptRows(kept.token_ids, kept.row, kept.host_counts, order.numpy(), order.argsort())
    mask = outside(sets, layout.places, layout.shape).reshape(-1, V)[layout.rows][order]
    for start in range(0, layout.num_rows - 4, 5):
        logits = torch.randn(5, V)
        want = logits.masked_fill(mask[start : start + 5], -torch.inf)
        assert torch.equal(rows.narrow(logits, start, start + 5), want)


def test_moves_with_its_layout():
    _, layout, *_ = policy_batch(seed=3, V=V)
    moved = layout.with_kept_tokens(some_sets(layout)).to("meta")
    assert moved.kept.token_ids.device.type == moved.kept.row.device.type == "meta"
    assert moved.kept.host_counts.device.type == "cpu"


def test_messages():
    batch, layout, advantages, *_ = policy_batch(seed=3, V=V)
    sets = some_sets(layout, whole=0.0)
    for bad, message in (
        (sets[:-1], r"kept: expected \d+ lists, one for each scored token, got \d+"),
        ([[], *sets[1:]], r"kept\[0\]: expected None or the ids of at least one token, got"),
        ([[0.5], *sets[1:]], r"kept\[0\]: expected None or the ids"),
        ([[(int(layout.labels[0]) + 1) % V], *sets[1:]], r"kept\[0\]: expected the scored token \d+ among those"),
        ([[-1, int(layout.labels[0])], *sets[1:]], r"kept: expected token ids of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.with_kept_tokens(bad)
    far = layout.with_kept_tokens([[V, int(layout.labels[0])], *sets[1:]])
    with pytest.raises(ValueError, match=rf"kept: expected token ids below {V}, got {V}"):
        step_policy_loss(batch.logits, far, advantages)
    narrow = layout.with_kept_tokens(sets)
    with pytest.raises(ValueError, match="logit_softcap: expected None beside kept tokens"):
        step_policy_loss(batch.logits, narrow, advantages, logit_softcap=30.0)
    hidden, weight = torch.randn(*layout.shape, H, dtype=F64), torch.randn(V, H, dtype=F64)
    with pytest.raises(ValueError, match="logit_softcap: expected None beside kept tokens"):
        linear_step_policy_loss(hidden, weight, narrow, advantages, logit_softcap=30.0)
    response = StepLayout.from_response(torch.ones(1, 3), torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="from_response"):
        response.with_kept_tokens([None] * 3)


def test_log_probs_of_an_engine_pass_as_they_are():
    """policy_loss sees log-probs that are narrowed already: the sets change nothing there."""
    batch, layout, advantages, *_ = policy_batch(seed=3, V=V)
    narrow = layout.with_kept_tokens(some_sets(layout))
    tokens = step_logps(batch.logits, narrow).tokens
    assert torch.equal(policy_loss(tokens, layout, advantages).loss, policy_loss(tokens, narrow, advantages).loss)
