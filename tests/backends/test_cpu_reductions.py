# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu's entropy, sum of squares and KL, every instruction set this machine has, against float64.

Mutations tried in csrc/cpu/row_reductions.h (edit, rebuild, AVX-512, run with -x) and the test that failed:
  t not kept finite where the logit is -inf        test_masked_vocabulary
  what the reference forbids counted               test_masked_vocabulary
  sum of e t not moved to a new shift              test_the_maximum_comes_late
  sum of e^2 moved by f, not by f^2                test_the_maximum_comes_late
  sum of s (r - t) not moved to a new shift        test_the_maximum_comes_late
  nor to a new shift of the reference              test_the_maximum_comes_late
  rounding of the shift left out of log p          test_huge_logits_are_finite
  an infinite KL of a first tile kept              test_masks_of_another_kind
The last but one survived at first; the rows "in steps" were added for it.
"""

import math

import pytest
import torch
from helpers.cpu_rows import NOT_BUILT
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

from sspo_ext.backends import cpu

pytestmark = pytest.mark.skipif(bool(NOT_BUILT), reason=str(NOT_BUILT))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1; odd; around a vector, a pair of vectors and a tile of 4096; several tiles
VOCABULARIES = [1, 2, 3, 17, 31, 64, 1023, 4097, 9001]


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp64_rule(isa, dtype, mapping):
    for V in VOCABULARIES:
        spread = 30.0 if mapping == "softcap" else 4.0
        check(cpu, ReductionRows(V, dtype, *MAPS[mapping], spread=spread, offset=V % 5), f"V {V}")


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_alone(isa, dtype, upstream):
    for ref in (True, False) if upstream != "kl" else (True,):
        check(cpu, ReductionRows(5003, dtype, *MAPS["temperature"], ref=ref), upstream, UPSTREAMS[upstream])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saturated_softcap(isa, dtype):
    for rows in SATURATED:
        for upstream in ("all", "log-prob", "kl"):
            check(cpu, saturated(1031, dtype, *rows), f"cap and reach {rows}, {upstream}", UPSTREAMS[upstream])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wide_softcap(isa, dtype):
    check_wide_cap(cpu, dtype)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 40.0])
def test_flat_and_peaked_rows(isa, spread):
    for dtype in (torch.float32, torch.bfloat16):
        check(cpu, ReductionRows(9001, dtype, 1.0, 0.0, spread=spread), f"spread {spread}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_maximum_comes_late(isa, dtype):
    """Ascending rows move the shift in every tile, the reference's at other places; a last tile far above the rest
    holds all the probability."""
    V = 20000
    case = ReductionRows(V, dtype, 1.0, 0.0)
    case.logits.copy_(torch.linspace(-30, 30, V) + 0 * case.logits.float())
    case.ref.copy_(torch.linspace(40, -10, V) + 0 * case.ref.float())
    check(cpu, case, "ascending")
    case.ref.copy_(torch.linspace(-40, 35, V) + 0 * case.ref.float())
    check(cpu, case, "both ascending")
    # by so little that what came before still counts, and for so many that their sum asks for another shift
    level = 7.0 * (torch.arange(V) // 4096)
    case.logits.copy_(level + 0.1 * torch.randn(V, generator=torch.Generator().manual_seed(1)))
    case.ref.copy_(level + torch.randn(V, generator=torch.Generator().manual_seed(2)))
    check(cpu, case, "in steps")
    case.ref.copy_(torch.randn(V, generator=torch.Generator().manual_seed(2)))
    check(cpu, case, "in steps, the reference flat")
    case = ReductionRows(V, dtype, 1.0, 0.0)
    case.logits[..., -7:] += 60
    case.ref[..., -9:] += 90
    check(cpu, case, "far above")


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_are_finite(isa, size):
    for dtype in (torch.float32, torch.bfloat16):
        case = ReductionRows(5000, dtype, 1.0, 0.0, ref=True)
        case.logits.add_(size)
        case.ref.add_(-size)
        check(cpu, case, f"{dtype} {size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_vocabulary(isa, dtype):
    """-inf: probability 0, nothing in any sum, gradient 0; whole tiles of it, first, between and last."""
    V = 16000
    for kept in (slice(9000, 9100), slice(0, 50), slice(15990, 16000), slice(4000, 12001, 400)):
        case = ReductionRows(V, dtype, 1.0, 0.0)
        for x in (case.logits, case.ref):
            values = x[..., kept].clone()
            x.fill_(-math.inf)
            x[..., kept] = values
        inside = torch.arange(V)[kept]
        case.labels = inside[case.labels % len(inside)]
        for upstream in ("all", "entropy", "kl"):
            check(cpu, case, f"kept {kept} {upstream}", UPSTREAMS[upstream])


def test_what_is_forbidden(isa):
    """KL is infinite where the reference allows what the policy forbids, and finite the other way round; its gradient
    p - q stays finite."""
    case = ReductionRows(6000, torch.float32, 1.0, 0.0)
    case.labels[:] = 7
    case.ref[..., 5000:] = -math.inf
    (_, _, _, kl), grad = case.run(cpu, UPSTREAMS["kl"])
    assert kl.isfinite().all() and grad.isfinite().all()
    case.ref, case.logits = case.logits, case.ref
    (_, _, _, kl), grad = case.run(cpu, UPSTREAMS["kl"])
    assert (kl == math.inf).all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_another_kind(isa, dtype):
    """The policy masks with -inf and the reference with a finite number, which allows nothing: wherever the mask is."""
    for mask in (-300.0, -1e4, -65504.0, -1e9, torch.finfo(dtype).min):
        for masked in (slice(0, 4500), slice(4500, 9000), slice(100, 200)):
            check_masks(cpu, 9000, dtype, mask, masked)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(isa, bad):
    """In the logits: every value of the row and its gradient; in the reference: KL and its gradient alone."""
    for dtype in DTYPES:
        case = ReductionRows(4500, dtype, 1.0, 0.0)
        clean, _ = case.run(cpu, UPSTREAMS["all"])
        case.logits[0, 2, 4400] = bad  # row 1
        values, grad = case.run(cpu, UPSTREAMS["all"])
        assert all(v[1].isnan() for v in values) and grad[0, 2].isnan().all() and grad[0, 0].isfinite().all()
        for v, c in zip(values, clean, strict=True):
            assert torch.equal(v[[0, 2, 3, 4]], c[[0, 2, 3, 4]])
        case = ReductionRows(4500, dtype, 1.0, 0.0)
        case.ref[0, 2, 4400] = bad
        values, grad = case.run(cpu, UPSTREAMS["all"])
        assert values[3][1].isnan() and all(v.isfinite().all() for v in values[:3]) and grad[0, 2].isnan().all()
        assert case.run(cpu, UPSTREAMS["entropy"])[1].isfinite().all()


def test_labels_out_of_range(isa):
    case = ReductionRows(300, torch.float32, 1.0, 0.0)
    case.labels = torch.tensor([-2, 300, 2**62, -1, 0])
    values, grad = case.run(cpu, UPSTREAMS["all"])
    assert values[0].isnan().tolist() == [True, True, True, False, False]
    assert all(v.isfinite().all() for v in values[1:])
    assert grad.view(8, 300)[[0, 2, 3]].isnan().all() and grad.view(8, 300)[5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_threads_and_runs_give_the_same_bits(isa, dtype):
    case = ReductionRows(70001, dtype, 1.0, 0.0, offset=3)
    values, grad = case.run(cpu, UPSTREAMS["all"])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again, grad_again = case.run(cpu, UPSTREAMS["all"])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(v, w) for v, w in zip(values, again, strict=True)) and torch.equal(grad, grad_again)
    case.run(cpu, UPSTREAMS["all"], out=case.logits)
    assert torch.equal(case.logits, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_gradient_is_streamed_alike(isa, dtype):
    """33 MiB: memory in use is written past the caches."""
    V = 70001
    T = (33 << 20) // (V * dtype.itemsize) + 1
    logits = torch.randn(1, T, 2000, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 36)[..., :V].to(dtype)
    ref, rows, labels = logits.flip(1), torch.arange(T), torch.arange(T) * 37 % V
    _, lse, entropy, _, _, ref_lse = cpu.row_reductions_fwd(logits, rows, labels, ref, 1.0, 0.0)
    coefs = torch.stack([torch.linspace(-1, 1, T), entropy, -torch.ones(T), torch.ones(T), torch.ones(T)], 1)
    for reference in (ref, None):
        args = (logits, rows.int(), labels, lse, reference, ref_lse, coefs, 1.0, 0.0)
        used = torch.full_like(logits, math.nan)
        cpu.row_reductions_bwd(*args, used)
        over = logits.clone()
        cpu.row_reductions_bwd(over, *args[1:], over)
        assert torch.equal(used, over)


def test_log_probs_are_those_of_the_plain_kernel(isa):
    case = ReductionRows(12007, torch.float32, 1.0, 0.0)
    values, _ = case.run(cpu, UPSTREAMS["all"])
    plain, _ = cpu.token_logp_fwd(case.logits, case.rows, case.labels, 1.0, 0.0)
    torch.testing.assert_close(values[0], plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (2, 4, 8)])
def test_nothing_to_do(isa, shape):
    logits, none = torch.randn(shape), torch.empty(0, dtype=torch.int64)
    for ref in (None, logits.clone()):
        *values, ref_lse = cpu.row_reductions_fwd(logits, none, none, ref, 1.0, 0.0)
        assert all(v.shape == (0,) for v in values)
        out, table = torch.full(shape, math.nan), torch.full((shape[0] * shape[1],), -1, dtype=torch.int32)
        cpu.row_reductions_bwd(logits, table, none, values[1], ref, ref_lse, torch.empty(0, 5), 1.0, 0.0, out)
        assert (out == 0).all()


def test_refused_arguments():
    case = ReductionRows(20, torch.float32, 1.0, 0.0)
    args = (case.logits, case.rows, case.labels)
    with pytest.raises(TypeError, match="ref: expected"):
        cpu.row_reductions_fwd(*args, case.ref.double(), 1.0, 0.0)
    with pytest.raises(TypeError, match="ref: expected"):
        cpu.row_reductions_fwd(*args, case.ref[..., :-1], 1.0, 0.0)
    lse, coefs = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 5)
    rest = (case.row_of, case.labels, lse, case.ref, lse)
    with pytest.raises(TypeError, match="25 torch.float32"):
        cpu.row_reductions_bwd(case.logits, *rest, coefs[:4], 1.0, 0.0, torch.empty_like(case.logits))
    with pytest.raises(TypeError, match="out: expected"):
        cpu.row_reductions_bwd(case.logits, *rest, coefs, 1.0, 0.0, case.logits.double())
    with pytest.raises(ValueError, match="out: overlaps"):
        cpu.row_reductions_bwd(case.logits[:, ::2], case.row_of[:4], *rest[1:3], None, lse, coefs, 1.0, 0.0,
                               case.logits[:, :2])  # fmt: skip
