# SPDX-License-Identifier: Apache-2.0
"""The log-prob kernels of csrc/cpu, every instruction set this machine has, against float64.

Mutations tried in csrc/cpu (edit, rebuild, run with -x, AVX-512) and the first test that failed:
  drop the rescale of the running sum               test_the_running_maximum (ascending)
  never look at a later tile's sum again            test_the_running_maximum (ascending)
  forget the remainder in the sum                   test_forward_and_backward_keep_the_fp64_rule
  count the padding in the sum                      test_forward_and_backward_keep_the_fp64_rule
  forget the pairs after the unrolled loop          test_forward_and_backward_keep_the_fp64_rule
  forget the remainder in the backward              test_forward_and_backward_keep_the_fp64_rule
  label one too low, forward                        test_forward_and_backward_keep_the_fp64_rule
  label one too low, backward                       test_forward_and_backward_keep_the_fp64_rule
  no label element in the backward                  test_forward_and_backward_keep_the_fp64_rule
One survived: counting the padding in the first tile's maximum, since float32 has room for a maximum that is too large.
The "low" row of test_the_running_maximum was added for it afterwards.
In a wrapper, bfloat16 and float16, every map: all elements of the gradient but the label's times 0, 0.5, 0.9, 0.98,
1.02, 1.1, 1.5, 2, 3 or -1. Each is red in test_forward_and_backward_keep_the_fp64_rule, where a bound from the largest
element alone let 0.9 and 1.1 pass.
"""

import math

import pytest
import torch
from helpers.cpu_rows import (
    DTYPES,
    MAPS,
    NOT_BUILT,
    accumulator,
    assert_each_element,
    check_against_truth,
    make,
    row_of,
    torch_logps_and_grad,
)
from helpers.truth import assert_fp64_rule

from sspo_ext.backends import cpu

pytestmark = pytest.mark.skipif(bool(NOT_BUILT), reason=str(NOT_BUILT))

# 1; odd; around a vector, a pair of vectors and a tile of 4096; several tiles
VOCABULARIES = [1, 2, 3, 17, 31, 64, 1023, 4096, 4097, 32000, 50257]


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_keep_the_fp64_rule(isa, dtype, mapping):
    for V in VOCABULARIES:
        logits, rows, labels, table, coef = make(dtype, V, seed=V)
        _, lse, out = check_against_truth(logits, rows, labels, table, coef, *MAPS[mapping], f"{isa} V={V}")
        over = logits.clone()
        cpu.token_logp_bwd(over, table, labels, lse, coef, None, *MAPS[mapping], over)
        assert torch.equal(over, out), f"V={V}: in place differs from a new buffer"
        assert (out.view(8, V)[table < 0] == 0).all(), f"V={V}: rows without a token must get zeros"


def test_float32_is_much_closer_than_16_bit_rounding(isa):
    """An absolute bound too: the rule above is lax where torch rounds log-probs to 16 bits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, rows, labels, _, coef = make(dtype, 50257)
        logp, _ = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
        truth, _ = torch_logps_and_grad(logits, rows, labels, coef, 1.0, 0.0, torch.float64)
        assert (logp.double() - truth).abs().max() < 3e-6


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("dtype,half_ulp", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_16_bit_gradients_are_rounded_once(isa, dtype, half_ulp, mapping):
    """Every element within half a unit of the last place: 1.01 leaves 1 % for the exponential."""
    a, c = MAPS[mapping]
    logits, rows, labels, table, coef = make(dtype, 4097, spread=1.0)
    coef = torch.full_like(coef, 100.0)  # well above float16's subnormals
    _, lse = cpu.token_logp_fwd(logits, rows, labels, a, c)
    out = torch.empty_like(logits)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, a, c, out)
    _, truth = torch_logps_and_grad(logits, rows, labels, coef, a, c, torch.float64)
    normal = truth.abs() > torch.finfo(dtype).tiny * 4
    assert normal.sum() > 15000
    relative = ((out.double() - truth).abs() / truth.abs())[normal]
    assert relative.max() <= 1.01 * half_ulp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["shifted slice", "padded rows", "storage offset 1", "transposed batch", "V slice"])
def test_strides_and_misaligned_storage(isa, dtype, view):
    V, (a, c) = 1031, (0.9, 0.0)
    base, rows, labels, _, coef = make(dtype, V)
    B, T = 2, 3
    rows, labels, coef = torch.tensor([0, 2, 4]), labels[:3].contiguous(), coef[:3].contiguous()
    if view == "shifted slice":
        logits = base[:, :-1]
    elif view == "padded rows":
        logits = torch.full((B, T, V + 3), math.nan, dtype=dtype)[..., :V].copy_(base[:, :T])
    elif view == "storage offset 1":
        flat = torch.full((B * T * V + 1,), math.nan, dtype=dtype)
        logits = flat[1:].view(B, T, V).copy_(base[:, :T])
    elif view == "transposed batch":
        logits = base[:, :T].transpose(0, 1).contiguous().transpose(0, 1)
    else:
        logits = base[:, :T, 7 : V - 6]
    labels = labels.clamp(max=logits.shape[-1] - 1)
    table = row_of(rows, B * T)
    assert not logits.is_contiguous() or view == "storage offset 1"
    _, lse, out = check_against_truth(logits, rows, labels, table, coef, a, c, view)
    owner = logits._base if logits._base is not None else logits
    before = owner.clone()
    inside = torch.zeros_like(owner, dtype=torch.bool)
    inside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, a, c, logits)
    assert torch.equal(logits, out), "in place differs from a new buffer"
    assert torch.equal(owner[~inside].nan_to_num(123.0), before[~inside].nan_to_num(123.0)), "wrote outside the view"


def test_near_certain_tokens(isa):
    """Truth is far below an eps of the logits: docs/numerics.md says what takes its place in the rule's floor."""
    rows, labels, coef = torch.arange(4), torch.full((4,), 3), torch.ones(4)
    for size in range(1, 90):
        logits = torch.zeros(1, 4, 17)
        logits[..., 3] = torch.linspace(size, size + 0.9, 4)
        truth, exact = torch_logps_and_grad(logits, rows, labels, coef, 1.0, 0.0, torch.float64)
        by_torch, _ = torch_logps_and_grad(logits, rows, labels, coef, 1.0, 0.0, torch.float32)
        logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
        assert_fp64_rule(logp, by_torch, truth, 17, f"{size}", scale=size + 0.9)
        out = torch.empty_like(logits)
        cpu.token_logp_bwd(logits, rows.int(), labels, lse, coef, None, 1.0, 0.0, out)
        assert_each_element(out, exact, logits, rows, labels, coef, 1.0, 0.0, f"{size}")
        assert (logp <= 0).all()


def rule_on(logits, labels):
    """One row per position of (1, T, V) logits."""
    T = logits.shape[1]
    rows, coef = torch.arange(T), torch.linspace(0.5, 1.5, T).to(accumulator(logits.dtype))
    return check_against_truth(logits, rows, labels, row_of(rows, T), coef, 1.0, 0.0, "row")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["ascending", "descending", "late maximum", "steps", "first tile masked", "low"])
def test_the_running_maximum(isa, dtype, order):
    """Rows whose maximum moves by more than float32's exponents hold, in either direction."""
    V = 20011  # not a multiple of anything
    if order == "ascending":
        row = torch.linspace(-3000, 3000, V)
    elif order == "descending":
        row = torch.linspace(3000, -3000, V)
    elif order == "late maximum":
        row = torch.randn(V, generator=torch.Generator().manual_seed(0)) - 500
        row[-3] = 20.0
    elif order == "steps":
        row = (torch.arange(V) // 3000).float() * 35.0
    elif order == "first tile masked":
        row = torch.randn(V, generator=torch.Generator().manual_seed(0)) - 1000
        row[:9000] = -math.inf
    else:  # one tile, so low that a maximum of 0, from padding, would leave subnormals
        V = 1031
        row = torch.randn(V, generator=torch.Generator().manual_seed(0)) - 100
    logits = row.to(dtype).expand(1, 3, V)
    labels = torch.tensor([V - 1, V - 3, V * 3 // 5])
    logp, lse, _ = rule_on(logits, labels)
    assert torch.isfinite(lse).all() and torch.isfinite(logp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(isa, dtype):
    """A constant of 1e4 on every logit: float32 would round lse by 5e-4, and that must not enter the gradient."""
    logits, rows, labels, table, coef = make(torch.float32, 5000)
    logits = (logits + 1e4).to(dtype)
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    truth_logp, truth_grad = torch_logps_and_grad(logits, rows, labels, coef, 1.0, 0.0, torch.float64)
    torch_logp, torch_grad = torch_logps_and_grad(logits, rows, labels, coef, 1.0, 0.0, dtype)
    assert_fp64_rule(logp, torch_logp, truth_logp, 5000, "logp")
    out = torch.empty_like(logits)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, 1.0, 0.0, out)
    assert_fp64_rule(out, torch_grad, truth_grad, 1, "gradient")
    assert_each_element(out, truth_grad, logits, rows, labels, coef, 1.0, 0.0, "shifted")


def test_float16_stays_finite_to_its_last_number(isa):
    logits = torch.full((1, 2, 100), -65504.0, dtype=torch.float16)
    logits[0, :, 7] = 65504.0
    logp, lse = cpu.token_logp_fwd(logits, torch.arange(2), torch.tensor([7, 8]), 1.0, 0.0)
    torch.testing.assert_close(lse, torch.tensor([65504.0, 65504.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert logp.tolist() == pytest.approx([0.0, -131008.0], abs=1e-6)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_vocabulary_has_probability_and_gradient_zero(isa, dtype, low):
    logits, rows, labels, table, coef = make(dtype, 1100)
    low = max(low, torch.finfo(dtype).min) if math.isfinite(low) else low
    keep = torch.zeros(1100, dtype=torch.bool)
    keep[::7] = True
    logits[..., ~keep] = low
    labels = torch.tensor([0, 7, 14, 1099 - 1099 % 7, 700])
    logp, _, out = check_against_truth(logits, rows, labels, table, coef, 1.0, 0.0, "masked")
    assert torch.isfinite(logp).all() and (out[..., ~keep] == 0).all()
