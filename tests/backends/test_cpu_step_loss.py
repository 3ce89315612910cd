# SPDX-License-Identifier: Apache-2.0
"""The step kernel of csrc/cpu against the reference."""

import math

import pytest
import torch
from helpers.cpu_rows import NOT_BUILT

from sspo_ext.backends import cpu, reference
from sspo_ext.backends.arguments import StepLossArguments
from sspo_ext.formulas.registry import PAIR_FORMULAS

pytestmark = pytest.mark.skipif(bool(NOT_BUILT), reason=str(NOT_BUILT))


def step_problem(seed, S=7, P=9, dtype=torch.float64):
    """Random steps, one of them empty, and pairs of which two share a step and one has the empty step."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 6, (S,), generator=g)
    counts[3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    index = torch.stack([torch.randperm(S, generator=g)[:2] for _ in range(P)]).int()
    index[0] = torch.tensor([1, 3])
    entries = sorted((int(index[p, side]), 2 * p + side) for p in range(P) for side in (0, 1))
    adjacency = torch.tensor([e for _, e in entries], dtype=torch.int32)
    degree = torch.bincount(torch.tensor([s for s, _ in entries]), minlength=S)
    adj_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)]).int()
    N = int(counts.sum())

    def rand(n):
        return torch.rand(n, generator=g, dtype=torch.float64).to(dtype)

    return {
        "logp": -3 * rand(N), "weights": rand(N), "offsets": offsets, "ref": -5 * rand(S), "index": index,
        "adj_offsets": adj_offsets, "adjacency": adjacency, "pair_weights": rand(P), "margins": rand(P),
        "labels": rand(P), "scale": torch.tensor(0.37, dtype=dtype),
    }  # fmt: skip


def run_step_loss(p, head, options, label, optional=True):
    def opt(name):
        return p[name] if optional else None

    return cpu.step_loss_fwd(StepLossArguments(
        p["logp"], opt("weights"), p["offsets"], opt("ref"), p["index"], p["adj_offsets"], p["adjacency"],
        opt("pair_weights"), opt("margins"), opt("labels"), p["scale"], head, options, label,
    ))  # fmt: skip


@pytest.mark.parametrize("optional", [True, False], ids=["everything", "nothing optional"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("head", PAIR_FORMULAS)
def test_step_loss_equals_the_reference(head, dtype, optional):
    options = [0.3 + 0.2 * i for i in range(len(PAIR_FORMULAS[head].options))]
    for seed in range(3):
        p = step_problem(seed, dtype=dtype)
        d = {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
        counts = d["offsets"].diff()
        logp = d["logp"].clone().requires_grad_()
        step_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        sums = reference.step_sums(logp, d["weights"] if optional else None, step_of_row, len(counts))
        losses = reference.pair_losses(
            sums, counts, d["ref"] if optional else None, d["index"], d["margins"] if optional else None,
            d["labels"] if optional else None, head, options, 0.9,
        )  # fmt: skip
        loss = d["scale"] * (losses * d["pair_weights"] if optional else losses).sum()
        (coef,) = torch.autograd.grad(loss, logp)
        got = run_step_loss(p, head, options, 0.9, optional)
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
        for value, expected in zip(got, (loss, sums, losses, coef), strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), expected.detach(), **tolerance)
        assert got[2][0] == 0, "a pair with an empty step has loss 0"


def test_step_loss_of_nothing():
    none_f, none_i = torch.empty(0), torch.empty(0, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    loss, sums, pair_loss, coef = cpu.step_loss_fwd(StepLossArguments(
        none_f, None, zero, None, none_i.view(0, 2), zero, none_i, None, None, None, torch.ones(()), "sigmoid", [0.1],
        1.0,
    ))  # fmt: skip
    assert loss == 0 and sums.shape == pair_loss.shape == coef.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_step_loss_takes_no_other_dtype(dtype):
    """The kernel would write 4 bytes into each element."""
    none_i, scale = torch.empty(0, dtype=torch.int32), torch.ones((), dtype=dtype)
    args = (None, torch.tensor([0, 8], dtype=torch.int32), None, none_i.view(0, 2), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match=f"logps: expected torch.float32 or torch.float64, got {dtype}"):
        given = StepLossArguments(
            torch.ones(8).to(dtype), *args, none_i, None, None, None, scale, "sigmoid", [0.1], 1.0
        )
        cpu.step_loss_fwd(given)


def test_step_loss_sums_in_double_and_keeps_nan():
    n = 200_000
    logp = torch.full((n,), -0.1)
    offsets = torch.tensor([0, n], dtype=torch.int32)
    none_i = torch.empty(0, dtype=torch.int32)
    args = (None, offsets, None, none_i.view(0, 2), torch.zeros(2, dtype=torch.int32), none_i, None, None, None)
    _, sums, _, _ = cpu.step_loss_fwd(StepLossArguments(logp, *args, torch.tensor(1.0), "sigmoid", [0.1], 1.0))
    assert abs(sums.item() / (n * logp[0].double().item()) - 1) < 1e-7
    logp[5] = math.nan
    given = StepLossArguments(logp, *args, torch.tensor(1.0), "sigmoid", [0.1], 1.0)
    assert cpu.step_loss_fwd(given)[1].isnan().all()
