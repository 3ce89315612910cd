# SPDX-License-Identifier: Apache-2.0
"""Every loss of a tree of sequences against the same sequences in a padded batch, whose logits autograd gathers.

Float64, to 1e-12 of the largest value: the reference and every fused backend, from logits and from hidden states.

Mutations of sspo_ext/routes, each caught by the test named (on a copy of the package):
  a shared token has the coefficient of one sequence      test_pair_losses, test_policy_losses
  extra rows dropped: a branch's first label alone        test_pair_losses, test_step_logps
  softmax of the first label's coefficient alone          test_pair_losses, test_step_logps
  hidden gradients of a branching position overwritten    test_pair_losses
  steps that share rows in different units                test_pair_losses
  entropy's gradient of one sequence                      test_step_logps
"""

import pytest
import torch
from helpers.loss_calls import calls
from helpers.policy import AGGREGATIONS, VARIANTS, with_old
from helpers.tree import TreeBatch, random_tree

from sspo_ext.formulas.registry import PAIR_FORMULAS
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.losses.common import LOSS_FUNCTIONS
from sspo_ext.losses.logps import linear_step_logps, step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.losses.pref import linear_step_pref_loss, pref_loss, step_pref_loss
from sspo_ext.losses.tokens import full_step_dpo_loss, wpo_weights

F64 = torch.float64
V, H = 11, 6
HEADS = {"trained": (1, 1, 1), "frozen": (1, 0, 0), "weight": (0, 1, 0), "none": (0, 0, 0)}


class Both:
    """A tree and its padded batch, and what `call(route)` gives on both: values and gradients."""

    def __init__(self, seed: int, **options):
        self.batch: TreeBatch = random_tree(seed, V=V, dtype=F64, **options)
        g = self.generator = torch.Generator().manual_seed(seed + 1)
        self.hidden = torch.randn(*self.batch.tree.shape, H, generator=g, dtype=F64)
        self.weight, self.bias = (torch.randn(*s, generator=g, dtype=F64) for s in ((V, H), (V,)))

    def pairs(self, count: int = 9) -> StepPairs:
        layout, g = self.batch.layout, self.generator
        steps = layout.num_steps
        winner = torch.randint(0, steps, (count,), generator=g)
        loser = (winner + 1 + torch.randint(0, steps - 1, (count,), generator=g)) % steps
        constants = {"weights": torch.rand(count, generator=g), "margins": torch.rand(count, generator=g)}
        return StepPairs.from_index(layout, torch.stack([winner, loser], 1), **constants)

    def logits(self, loss, backend: str, **more) -> None:
        """`loss(logits, layout, backend=)` -> (what is differentiated, other values)."""
        ours, theirs = (self.batch.logits.clone().requires_grad_() for _ in range(2))
        # `* 1`: in-place backward may not write over a leaf
        got = loss(ours * 1, self.batch.layout, backend=backend, **more)
        want = loss(self.batch.unshared(theirs), self.batch.plain, backend="reference")
        compare(got, want, [ours], [theirs])

    def linear(self, loss, backend: str, head: str, **more) -> None:
        """The same of `loss(hidden, weight, layout, bias=, backend=)`."""

        def leaves():
            given = zip((self.hidden, self.weight, self.bias), HEADS[head], strict=True)
            return [t.clone().requires_grad_(bool(need)) for t, need in given]

        ours, theirs = leaves(), leaves()
        got = loss(ours[0], ours[1], self.batch.layout, bias=ours[2], backend=backend, **more)
        want = loss(self.batch.unshared(theirs[0]), theirs[1], self.batch.plain, bias=theirs[2], backend="reference")
        compare(got, want, ours, theirs)


def compare(got, want, ours, theirs):
    (got_loss, got_values), (want_loss, want_values) = got, want
    near(got_loss, want_loss, "loss")
    for n, (a, b) in enumerate(zip(got_values, want_values, strict=True)):
        near(a, b, f"value {n}")
    if want_loss.requires_grad:
        (got_loss * -1.7).backward()
        (want_loss * -1.7).backward()
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert b.grad.abs().max() > 0
            near(a.grad, b.grad, f"gradient {n}")


def near(got, want, name):
    assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
    error = (got - want).abs().max().item() if want.numel() else 0.0
    size = max(1.0, want.abs().max().item() if want.numel() else 0.0)
    assert error <= 1e-12 * size, f"{name}: off by {error:.3g} of {size:.3g}"


def budget(rows):
    return {} if rows is None else {"chunk_bytes": rows * V * 8}


@pytest.mark.parametrize(("seed", "weighted"), [(0, False), (3, True)])
@pytest.mark.parametrize("loss_type", [*PAIR_FORMULAS, ("sigmoid", "sft", "simpo")])
def test_pair_losses(backend, loss_type, seed, weighted):
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    facts = [PAIR_FORMULAS[name] for name in names]
    both = Both(seed, weighted=weighted)
    pairs = both.pairs()
    if not any(f.margins for f in facts):
        pairs = StepPairs.from_index(both.batch.layout, pairs.host_index, weights=pairs.weights)
    options = {"loss_type": loss_type if isinstance(loss_type, str) else list(loss_type)}
    if any(f.smoothing == "required" for f in facts):
        options["label_smoothing"] = 0.1
    if any(f.reference != "forbidden" for f in facts):
        tokens = step_logps(both.batch.logits, both.batch.layout, backend="reference").tokens
        options["ref"] = tokens + torch.randn(tokens.shape, generator=both.generator, dtype=F64)

    def loss(*args, **more):
        out = (linear_step_pref_loss if len(args) == 3 else step_pref_loss)(*args, pairs, **options, **more)
        return out.loss, (out.step_logps, out.pair_losses, out.rewards)

    for name in (backend, "reference"):
        both.logits(loss, name)
        for head, rows in (("trained", None), ("trained", 5), ("frozen", 5), ("weight", None), ("none", None)):
            both.linear(lambda *args, head=head, rows=rows, **more: loss(*args, **budget(rows), **more), name, head)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 3.0, "logit_scale": 1.4}, {"temperature": 0.7}])
def test_maps_and_in_place(backend, options, inplace, seed):
    both = Both(seed)
    pairs = both.pairs()

    def loss(logits, layout, **more):
        out = step_pref_loss(logits, layout, pairs, reference_free=True, **options, **more)
        return out.loss, (out.step_logps,)

    both.logits(loss, backend, inplace_backward=inplace)


@pytest.mark.parametrize(("seed", "weighted"), [(1, False), (4, True)])
@pytest.mark.parametrize("asked", ["tokens", "sums", "entropy", "sum_p2", "kl", "all"])
def test_step_logps(backend, asked, seed, weighted):
    both = Both(seed, weighted=weighted)
    batch, g = both.batch, both.generator
    other = torch.randn(batch.logits.shape, generator=g, dtype=F64)
    ref_hidden = torch.randn(*batch.tree.shape, H, generator=g, dtype=F64)
    factors = torch.randn(5, batch.layout.num_rows, generator=g, dtype=F64)
    per_step = torch.randn(batch.layout.num_steps, generator=g, dtype=F64)
    wants = {"entropy": asked in ("entropy", "all"), "sum_p2": asked in ("sum_p2", "all")}
    kl = asked in ("kl", "all")

    def loss(*args, **more):
        layout = args[-1]
        if len(args) == 3:
            given = {"kl_ref_hidden": ref_hidden} if kl else {}
            call = linear_step_logps
        else:
            given = {"kl_ref_logits": other} if kl else {}
            call = step_logps
        if layout is batch.plain:
            given = {name: batch.unshared(value) for name, value in given.items()}
        out = call(*args, **wants, **given, **more)
        values = [out.tokens, out.entropy, out.sum_p2, out.kl]
        total = sum((f * v).sum() for f, v in zip(factors, values, strict=False) if v is not None)
        if asked in ("tokens", "sums"):
            total = (factors[0] * out.tokens).sum() if asked == "tokens" else (per_step * out.sums).sum()
        return total, [out.sums, *(v.detach() for v in values if v is not None)]

    for name in (backend, "reference"):
        both.logits(loss, name)
        for head in HEADS:
            both.linear(lambda *args, **more: loss(*args, **budget(5), **more), name, head)


def test_reductions_in_place(backend):
    both = Both(0)
    layout = both.batch.layout
    other = torch.randn(both.batch.logits.shape, generator=both.generator, dtype=F64)

    def loss(logits, own, **more):
        ref = other if own is layout else both.batch.unshared(other)
        out = step_logps(logits, own, entropy=True, sum_p2=True, kl_ref_logits=ref, **more)
        return (out.tokens * 0.3 + out.entropy - out.sum_p2 + out.kl).sum(), ()

    both.logits(loss, backend, inplace_backward=True)


@pytest.mark.parametrize(
    ("seed", "weighted", "more_options"),
    [
        (0, False, {}),
        (2, True, {"kl_coef": 0.1}),
        (3, False, {"kl_coef": 0.1, "entropy_coef": 0.05}),
        (6, True, {"prob_threshold": 0.5}),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_losses(backend, variant, aggregation, seed, weighted, more_options):
    both = Both(seed, weighted=weighted)
    layout, g = both.batch.layout, both.generator
    tokens = step_logps(both.batch.logits, layout, backend="reference").tokens
    old, ref = (tokens + torch.randn(tokens.shape, generator=g, dtype=F64) * s for s in (0.2, 0.3))
    advantages = torch.randn(layout.num_steps, generator=g, dtype=F64)
    options = {**with_old(VARIANTS[variant], old), **more_options, "aggregation": aggregation}
    if "kl_coef" in options:
        options["ref"] = ref
    if "prob_threshold" in options:
        options["old"] = old

    def loss(*args, **more):
        out = (linear_step_policy_loss if len(args) == 3 else step_policy_loss)(*args, advantages, **options, **more)
        return out.loss, (out.tokens, out.step_logps, *(() if out.entropy is None else (out.entropy,)))

    for name in (backend, "reference"):
        both.logits(loss, name)
        for head, rows in (("trained", None), ("trained", 5), ("frozen", 5), ("none", None)):
            both.linear(lambda *args, rows=rows, **more: loss(*args, **budget(rows), **more), name, head)
    both.logits(loss, backend, inplace_backward=True)


@pytest.mark.parametrize("name", [name for name in LOSS_FUNCTIONS if name != "full_step_dpo"])
def test_losses_of_step_log_probs(backend, name):
    """All but full_step_dpo, whose reference is on the grid here."""
    both = Both(5)
    batch, needs_kl = both.batch, name in ("oreo", "tdpo1", "tdpo2")
    other = torch.randn(batch.logits.shape, generator=both.generator, dtype=F64)
    calls_on = [calls(layout, torch.Generator().manual_seed(1))[name] for layout in (batch.layout, batch.plain)]

    def loss(logits, layout, **more):
        tree = layout is batch.layout
        ref = {"kl_ref_logits": other if tree else batch.unshared(other)} if needs_kl else {}
        out = calls_on[0 if tree else 1](step_logps(logits, layout, **ref, **more))
        return out.loss, (out.losses, out.rewards)

    both.logits(loss, backend)


def test_values_on_the_grid(backend):
    """What is (B, T) beside a padded batch is (R, L) beside a tree: the reference, old log-probs, advantages."""
    both = Both(1)
    batch, g = both.batch, both.generator
    grid, advantages = (torch.randn(batch.tree.shape, generator=g, dtype=F64) for _ in range(2))
    pairs = both.pairs()

    def on(values, layout):
        return values if layout is batch.layout else batch.unshared(values)

    def pair(logits, layout, **more):
        out = step_pref_loss(logits, layout, pairs, ref=on(grid, layout), **more)
        return out.loss, (out.rewards,)

    def policy(logits, layout, **more):
        given = {"old": on(grid - 3, layout), "ref": on(grid - 3, layout), "kl_coef": 0.1, "loss_type": "ppo"}
        return step_policy_loss(logits, layout, on(advantages, layout), **given, **more).loss, ()

    rewards, solutions = torch.rand(batch.layout.num_steps, generator=g), torch.tensor([[0, 1], [1, 2]])

    def full(logits, layout, **more):
        logps = step_logps(logits, layout, **more)
        out = full_step_dpo_loss(logps, layout, solutions, rewards, ref=on(grid, layout))
        return out.loss, (out.losses,)

    for loss in (pair, policy, full):
        both.logits(loss, backend)
        both.logits(loss, "reference")


def test_two_passes(backend):
    """`pref_loss` of step log-probs with WPO's weights, which come from the same tokens."""
    both = Both(2)
    pairs = both.pairs()

    def loss(*args, **more):
        logps = (linear_step_logps if len(args) == 3 else step_logps)(*args, sum_p2=True, **more)
        weights = wpo_weights(logps, args[-1], pairs)
        return pref_loss(logps, args[-1], pairs, weights=weights, reference_free=True).loss, (weights,)

    both.logits(loss, backend)
    both.linear(loss, backend, "trained")
