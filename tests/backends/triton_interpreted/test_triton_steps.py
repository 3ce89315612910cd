# SPDX-License-Identifier: Apache-2.0
"""Triton step kernel, interpreted, against the reference in float64; and the whole route through the public loss.

Shown to fail by breaking the kernel: a sum not continued beyond the first block (test_long_steps); pairs of the first
block alone (test_more_pairs_than_a_block); n of the wrong side, pair weights left out of the loss (test_formulas).

Meant to fail here: weights left out of the sum, or of the coefficients; reference not subtracted from the partner;
sides swapped; du overwritten and not added up; empty steps kept; scale left out; counter not reset.
"""

import importlib

import pytest
import torch
from helpers.truth import assert_fp64_rule

import sspo_ext
from sspo_ext.backends import reference
from sspo_ext.backends import triton as backend
from sspo_ext.backends.arguments import StepLossArguments
from sspo_ext.backends.triton.step_loss_fwd import BLOCK
from sspo_ext.formulas.registry import PAIR_FORMULAS

# The package's attribute of this name is the launcher.
KERNEL_FILE = importlib.import_module("sspo_ext.backends.triton.step_loss_fwd")


def make(counts, pairs, *, weights=False, ref=False, per_pair=False):
    """Inputs of step_loss_fwd by name, without a formula; `pairs` a list of (winner, loser)."""
    counts, index = torch.tensor(counts, dtype=torch.int32), torch.tensor(pairs, dtype=torch.int32).view(-1, 2)
    S, N, P = len(counts), int(counts.sum()), len(index)
    entries = [[] for _ in range(S)]
    for p, (winner, loser) in enumerate(pairs):
        entries[winner].append(2 * p)
        entries[loser].append(2 * p + 1)
    return {
        "logps": -torch.rand(N) * 4,
        "weights": torch.rand(N) if weights else None,
        "step_offsets": torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)]),
        "ref": -torch.rand(S) * 100 if ref else None,
        "pair_index": index,
        "adj_offsets": torch.tensor([0] + [len(e) for e in entries]).cumsum(0, dtype=torch.int32),
        "adj_pairs": torch.tensor([x for e in entries for x in sorted(e)], dtype=torch.int32),
        "pair_weights": torch.rand(P) + 0.5 if per_pair else None,
        "pair_margins": torch.randn(P) if per_pair else None,
        "pair_labels": torch.rand(P) if per_pair else None,
        "scale": torch.tensor(1.0 / max(P, 1)),
    }


def truth(inputs, formula, options, label, dtype=torch.float64):
    """(loss, sums, pair_loss, coef) by the reference and autograd in `dtype`."""
    x = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    logps = x["logps"].requires_grad_()
    counts = x["step_offsets"].diff()
    step_of_row = torch.arange(len(counts)).repeat_interleave(counts.long())
    sums = reference.step_sums(logps, x["weights"], step_of_row, len(counts))
    losses = reference.pair_losses(
        sums, counts, x["ref"], x["pair_index"], x["pair_margins"], x["pair_labels"], formula, options, label
    )
    loss = x["scale"] * (losses if x["pair_weights"] is None else losses * x["pair_weights"]).sum()
    (coef,) = torch.autograd.grad(loss, logps, allow_unused=True) if loss.requires_grad else (None,)
    return loss.detach(), sums.detach(), losses.detach(), torch.zeros_like(logps) if coef is None else coef


def check(inputs, formula="sigmoid", options=None, label=0.9):
    options = list(PAIR_FORMULAS[formula].options.values()) if options is None else options
    got = backend.step_loss_fwd(StepLossArguments(**inputs, formula=formula, options=options, label=label))
    exact, by_torch = truth(inputs, formula, options, label), truth(inputs, formula, options, label, torch.float32)
    for name, g, e, t in zip(("loss", "sums", "pair_loss", "coef"), got, exact, by_torch, strict=True):
        assert g.shape == e.shape and g.dtype == torch.float32
        assert torch.isfinite(g).all(), f"{name}: not finite, {g}"
        if g.numel():
            assert_fp64_rule(g, t, e, 8, name)
    return got


@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("formula", PAIR_FORMULAS)
def test_formulas(formula, per_pair):
    pairs = [(0, 1), (2, 3), (4, 0), (1, 5)]
    check(
        make(
            [3, 5, 1, 2, 7, 4],
            pairs,
            weights=per_pair,
            ref=PAIR_FORMULAS[formula].reference != "forbidden",
            per_pair=per_pair,
        ),
        formula,
    )


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_long_steps(count):
    check(make([count, 2, count + 1], [(0, 1), (2, 0)], weights=True, ref=True), options=[0.01])


def test_steps_in_many_pairs():
    """All pairs of 6 rollouts, and a step against itself: coefficients add up, whichever side the step is on."""
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j] + [(2, 2)]
    check(make([4, 1, 9, 2, 3, 6], pairs, ref=True, per_pair=True))


def test_more_pairs_than_a_block(monkeypatch):
    monkeypatch.setattr(KERNEL_FILE, "BLOCK", 4)
    pairs = [(i, i + 1) for i in range(0, 10, 2)] * 2
    assert len(pairs) > 2 * KERNEL_FILE.BLOCK
    check(make([2] * 10, pairs, per_pair=True))


@pytest.mark.parametrize("formula", PAIR_FORMULAS)
def test_empty_steps_drop_their_pairs(formula):
    pairs = [(0, 1), (1, 0), (2, 3), (1, 4), (0, 3)]
    loss, sums, pair_loss, coef = check(make([3, 0, 2, 4, 0], pairs, per_pair=True), formula)
    assert sums[1] == sums[4] == 0
    assert (pair_loss[[0, 1, 3]] == 0).all()
    assert (coef != 0).any() or (pair_loss == 0).all(), "only a satisfied hinge pulls nothing"


@pytest.mark.parametrize(
    ("counts", "pairs"),
    [([], []), ([0, 0], []), ([0, 0], [(0, 1)]), ([3, 2], []), ([1, 1], [(0, 1)])],
    ids=["no steps", "empty steps", "empty pair", "no pairs", "one token each"],
)
def test_nothing(counts, pairs):
    loss, _, _, coef = check(make(counts, pairs))
    if not pairs or not sum(counts):
        assert loss == 0 and (coef == 0).all()


def test_nonfinite_propagates():
    for bad in (float("nan"), float("-inf")):
        inputs = make([2, 2, 2, 2], [(0, 1), (2, 3)])
        inputs["logps"][0] = bad
        given = StepLossArguments(**inputs, formula="sigmoid", options=[0.1], label=0.9)
        loss, sums, pair_loss, coef = backend.step_loss_fwd(given)
        assert not torch.isfinite(loss) and not torch.isfinite(sums[0]) and not torch.isfinite(pair_loss[0])
        assert torch.isfinite(coef[4:]).all() and torch.isfinite(pair_loss[1])


def test_same_bits_every_run_and_counter_left_at_zero(monkeypatch):
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(KERNEL_FILE, "arrival_counters", lambda device: counter)
    inputs = make([7, 300, 5, 9], [(0, 1), (2, 3), (1, 3)], weights=True, ref=True, per_pair=True)
    runs = [check(inputs) for _ in range(2)]
    assert counter == 0
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_public_loss(softcap, inplace):
    """Three launches through autograd, against the reference in float64, with a gradient that is not 1."""
    B, T, V = 2, 7, 521
    labels = torch.randint(V, (B, T))
    step_ids = torch.tensor([[-1, -1, 0, 0, 1, 2, -1], [-1, 0, 0, 1, 1, -1, -1]])
    logits = torch.randn(B, T, V) * 3
    options = dict(ref=-torch.rand(5) * 20, loss_type="ipo", beta=0.3, temperature=0.8, logit_softcap=softcap)

    def run(dtype, **kwargs):
        x = logits.to(dtype).requires_grad_()
        out = sspo_ext.step_pref_loss(x * 1, labels, step_ids, **options, **kwargs)
        (1.7 * out.loss).backward()
        return out.loss.detach(), out.step_logps, x.grad

    exact, by_torch = run(torch.float64, backend="reference"), run(torch.float32, backend="reference")
    got = run(torch.float32, backend="triton", inplace_backward=inplace)
    for g, e, t in zip(got, exact, by_torch, strict=True):
        assert_fp64_rule(g, t.float(), e, 8, "loss, step sums or gradient")
