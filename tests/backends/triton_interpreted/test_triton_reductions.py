# SPDX-License-Identifier: Apache-2.0
"""Triton row kernels with entropy, sum of squares and KL, interpreted, against float64.

Shown to fail by breaking the kernels: sums of exponents, of squares or of KL not moved to a new maximum, KL's label
read from the policy, 0 * -inf, softcapped lanes not masked (test_fp64_rule); a wrong label taken for
another shard's (test_label_outside_the_vocabulary); a gap between shares (test_in_place_and_shares).
"""

import importlib
import math

import pytest
import torch
from helpers.reductions import (
    MAPS,
    SATURATED,
    UPSTREAMS,
    ReductionRows,
    check,
    check_masks,
    check_wide_cap,
    saturated,
)

from sspo_ext.backends import triton as backend

# The package's attribute of this name is the launcher.
BACKWARD_FILE = importlib.import_module("sspo_ext.backends.triton.row_reductions_bwd")

# Edges alone; part of a pass; passes and a rest, with one warp and with four. A temperature is a factor of the scale;
# float16 is loaded as float32 is, and rounded as bfloat16 is.
SIZES = {
    ("plain", torch.float32): (1, 3, 9, 517, 1031, 4097),
    ("plain", torch.bfloat16): (5, 1031),
    ("plain", torch.float16): (1031,),
    ("temperature", torch.float32): (1031,),
    ("softcap", torch.float32): (5,),
    ("small cap", torch.float32): (1031,),  # of a masked lane that counts, -30 would not show
    ("softcap", torch.bfloat16): (1031,),
}


@pytest.mark.parametrize(("mapping", "dtype"), SIZES, ids=str)
def test_fp64_rule(dtype, mapping):
    for V in SIZES[mapping, dtype]:
        spread = 30.0 if mapping == "softcap" else 4.0
        check(backend, ReductionRows(V, dtype, *MAPS[mapping], spread=spread, offset=V % 7, few=True), f"V {V}")


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_each_gradient_alone(upstream):
    for ref in (True, False) if upstream == "all" else (True,):
        case = ReductionRows(533, torch.bfloat16, *MAPS["temperature"], ref=ref, offset=3, few=upstream != "all")
        check(backend, case, upstream, UPSTREAMS[upstream])


def test_several_passes_with_four_warps():
    check(backend, ReductionRows(9001, torch.bfloat16, 1.0, 0.0, offset=1, few=True), "V 9001")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype):
    case = ReductionRows(1500, dtype, 1.0, 0.0, few=True)
    case.logits.add_(1e4)
    case.ref.add_(-1e4)
    check(backend, case, "1e4")
    case = ReductionRows(1500, dtype, 1.0, 0.0, few=True)
    case.logits[..., -7:] += 60
    case.ref[..., -9:] += 90
    check(backend, case, "far above")
    case.logits.sub_(3e30 if dtype == torch.float32 else 0.0)
    values, _ = case.run(backend, UPSTREAMS["all"])
    assert all(v.isfinite().all() for v in values[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_vocabulary(dtype):
    V = 1500
    for kept in (slice(1000, 1100), slice(3, 1500, 700)):
        case = ReductionRows(V, dtype, 1.0, 0.0, few=True)
        for x in (case.logits, case.ref):
            values = x[..., kept].clone()
            x.fill_(-math.inf)
            x[..., kept] = values
        inside = torch.arange(V)[kept]
        case.labels = inside[case.labels % len(inside)]
        check(backend, case, f"kept {kept}")


def test_what_is_forbidden():
    case = ReductionRows(1200, torch.float32, 1.0, 0.0)
    case.labels[:] = 7
    case.ref[..., 1000:] = -math.inf
    (_, _, _, kl), grad = case.run(backend, UPSTREAMS["kl"])
    assert kl.isfinite().all() and grad.isfinite().all()
    case.ref, case.logits = case.logits, case.ref
    (_, _, _, kl), grad = case.run(backend, UPSTREAMS["kl"])
    assert (kl == math.inf).all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_another_kind(dtype):
    """The policy masks with -inf and the reference with a finite number, which allows nothing: wherever the mask is."""
    for mask in (-300.0, torch.finfo(dtype).min):
        for masked in (slice(0, 900), slice(700, 1500)):
            check_masks(backend, 1500, dtype, mask, masked, few=True)


@pytest.mark.parametrize(("dtype", "V"), [(torch.float32, 9), (torch.bfloat16, 530)], ids=str)
def test_rows_of_huge_numbers(V, dtype):
    """Uniform rows, as in test_triton_rows.py. The gradient of entropy, squares and KL is 0; that of the log-prob is
    right as long as lse holds log V."""
    for size in (1e8, -1e12, -1e30, torch.finfo(dtype).min, torch.finfo(dtype).max):
        for ref_size in (size, 1.0):
            case = ReductionRows(V, dtype, 1.0, 0.0, few=True)
            case.logits[:], case.ref[:], case.varied[:] = size, ref_size, 1.0
            values, grad = case.run(backend, UPSTREAMS["all"])
            for value, want in zip(values, (-math.log(V), math.log(V), 1 / V, 0.0), strict=True):
                assert (value - want).abs().max() <= 1e-5 * (1 + abs(want)), f"{size} {ref_size}: {values}"
            assert grad.isfinite().all(), f"{size} {ref_size}"
            if abs(size) > 1e13:
                continue
            want = torch.full((len(case.rows), V), -1.3 / V, dtype=torch.float64)
            want[torch.arange(len(want)), case.labels] += 1.3
            got = grad.view(-1, V)[case.rows].double()
            torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps + 2e-2, atol=1e-5)


def test_not_finite():
    for bad in (math.nan, math.inf):
        case = ReductionRows(700, torch.float32, 1.0, 0.0)
        clean, _ = case.run(backend, UPSTREAMS["all"])
        case.logits[0, 2, 600] = bad
        values, grad = case.run(backend, UPSTREAMS["all"])
        assert all(v[1].isnan() for v in values) and grad[0, 2].isnan().all() and grad[0, 0].isfinite().all()
        assert all(torch.equal(v[2:], c[2:]) for v, c in zip(values, clean, strict=True))
    case.logits[0, 2] = -math.inf
    lse = backend.row_reductions_fwd(case.logits, case.rows, case.labels, None, 1.0, 0.0)[1]
    assert lse[1] == -math.inf  # of a vocabulary shard that is all padding


def test_label_outside_the_vocabulary():
    """-1 is a label of another vocabulary shard: logp = -lse, gradient without a one-hot term. Any other label is NaN,
    in the whole row of the gradient too, whatever arrives at the row; what does not depend on the label stays as it is.
    """
    for name in ("all", "entropy", "kl"):
        case = ReductionRows(530, torch.float32, 1.0, 0.0, few=True)
        case.varied = torch.ones(3)
        clean, clean_grad = case.run(backend, UPSTREAMS[name])
        label = case.labels[0].item()
        case.labels = torch.tensor([-1, 530, 2**40])
        values, grad = case.run(backend, UPSTREAMS[name])
        lse = backend.row_reductions_fwd(case.logits, case.rows, case.labels, None, 1.0, 0.0)[1]
        assert values[0][0] == -lse[0].float() and values[0][1:].isnan().all() and lse.isfinite().all()
        assert all(torch.equal(v, c) for v, c in zip(values[1:], clean[1:], strict=True))
        grad, clean_grad = (g.view(-1, 530)[case.rows] for g in (grad, clean_grad))
        clean_grad[0, label] -= UPSTREAMS[name][0]
        torch.testing.assert_close(grad[0], clean_grad[0], rtol=1e-5, atol=1e-7)
        assert grad[1:].isnan().all(), name


def test_in_place_and_shares(monkeypatch):
    case = ReductionRows(2601, torch.bfloat16, 1.0, 0.0, offset=3)
    monkeypatch.setattr(BACKWARD_FILE, "column_shares", lambda *args: 1)
    _, grad = case.run(backend, UPSTREAMS["all"])
    monkeypatch.setattr(BACKWARD_FILE, "column_shares", lambda *args: 3)
    assert torch.equal(case.run(backend, UPSTREAMS["all"])[1], grad)
    case.run(backend, UPSTREAMS["all"], out=case.logits)
    assert torch.equal(case.logits, grad)


def test_nothing_to_do():
    logits, none = torch.randn(2, 4, 8), torch.empty(0, dtype=torch.int64)
    *values, ref_lse = backend.row_reductions_fwd(logits, none, none, logits, 1.0, 0.0)
    assert all(v.shape == (0,) for v in values)
    out, table = torch.full_like(logits, math.nan), torch.full((8,), -1, dtype=torch.int32)
    backend.row_reductions_bwd(logits, table, none, values[1], logits, ref_lse, torch.empty(0, 5), 1.0, 0.0, out)
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saturated_softcap(dtype):
    for rows in SATURATED:
        for upstream in ("log-prob", "kl"):
            case = saturated(67, dtype, *rows, few=True)
            check(backend, case, f"cap and reach {rows}, {upstream}", UPSTREAMS[upstream])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_wide_softcap(dtype):
    check_wide_cap(backend, dtype, few=True)
