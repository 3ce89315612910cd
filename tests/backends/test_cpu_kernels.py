"""The row kernels of csrc/cpu, every instruction set this machine has, against float64.

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
from helpers.truth import assert_fp64_rule, assert_rounded_once, gradient_terms

from sspo_ext.backends import cpu, reference
from sspo_ext.backends.arguments import StepLossArguments
from sspo_ext.formulas.registry import PAIR_FORMULAS

if cpu.why_not(torch.device("cpu"), torch.float32):
    pytest.skip(cpu.why_not(torch.device("cpu"), torch.float32), allow_module_level=True)

ISAS = [name for name, reason in cpu._C.isas().items() if not reason]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAPS = {"plain": (1.0, 0.0), "temperature": (1 / 0.7, 0.0), "softcap": (1 / 30.0, 30.0)}
# 1; odd; around a vector, a pair of vectors and a tile of 4096; several tiles
VOCABULARIES = [1, 2, 3, 17, 31, 64, 1023, 4096, 4097, 32000, 50257]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SSPO_CPU_ISA", request.param)
    assert cpu._C.isa() == request.param
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_logits(dtype, *shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def make(dtype, V, seed=0, spread=4.0):
    """logits (B, T, V), rows and labels of 5 of the 8 positions, with both ends of the vocabulary; row_of, coef."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 4, V, generator=g) * spread).to(dtype)
    rows = torch.tensor([0, 2, 3, 5, 6])
    labels = torch.randint(0, V, (5,), generator=g)
    labels[0], labels[1] = 0, V - 1
    coef = torch.randn(5, generator=g).to(accumulator(dtype))
    return logits, rows, labels, row_of(rows, 8), coef


def row_of(rows, positions):
    table = torch.full((positions,), -1, dtype=torch.int32)
    table[rows] = torch.arange(len(rows), dtype=torch.int32)
    return table


def torch_logps_and_grad(logits, rows, labels, coef, a, c, dtype):
    """log_softmax + gather and its gradient by autograd, computed in `dtype`."""
    x = logits.to(dtype).detach().reshape(-1, logits.shape[-1]).requires_grad_()
    needed = x[rows]
    z = a * needed if c == 0 else c * torch.tanh(a * needed)
    logp = z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    (grad,) = torch.autograd.grad(logp, x, coef.to(dtype))
    return logp.detach(), grad.view(logits.shape)


def assert_each_element(out, truth, logits, rows, labels, coef, a, c, name):
    got, truth, needed = (t.reshape(-1, t.shape[-1])[rows] for t in (out, truth, logits))
    terms = gradient_terms(needed, labels, coef, a, c)
    assert_rounded_once(got, truth, terms, f"{name} gradient")


def check_against_truth(logits, rows, labels, table, coef, a, c, name):
    V = logits.shape[-1]
    truth_logp, truth_grad = torch_logps_and_grad(logits, rows, labels, coef, a, c, torch.float64)
    torch_logp, torch_grad = torch_logps_and_grad(logits, rows, labels, coef, a, c, logits.dtype)
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, a, c)
    assert logp.dtype == accumulator(logits.dtype) and lse.dtype == torch.float64
    assert not (logp > 0).any()
    # a log-prob is a difference of mapped logits, an element of the gradient one of numbers of the size of dL/dz
    finite = logits.double()[logits.isfinite() & (logits > torch.finfo(logits.dtype).min)]
    scale = max(1.0, (a if c == 0 else 1.0) * finite.abs().max().item())
    assert_fp64_rule(logp, torch_logp, truth_logp, V, f"{name} logp", scale=scale)
    out = torch.full(logits.shape, math.nan, dtype=logits.dtype)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, a, c, out)
    grad_scale, length = None, 1
    if V <= 3 or logits.dtype == torch.float64:  # truth is 0, or torch's own
        grad_scale = (coef.abs().max() * (a if c == 0 else a * c)).item() * scale
    if logits.dtype == torch.float64:
        length = V
    assert_fp64_rule(out, torch_grad, truth_grad, length, f"{name} gradient", scale=grad_scale)
    assert_each_element(out, truth_grad, logits, rows, labels, coef, a, c, name)
    return logp, lse, out


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf", "-inf label", "all nan"])
@pytest.mark.parametrize("where", [0, 9000])
def test_non_finite_logits_propagate(isa, dtype, bad, where):
    V, label = 10000, 5
    logits = random_logits(dtype, 1, 3, V)
    clean = logits.clone()
    if bad == "all -inf":
        logits[0, 1] = -math.inf
    elif bad == "-inf label":
        label = where
        logits[0, 1, label] = -math.inf
    elif bad == "all nan":
        logits[0, 1] = math.nan
    else:
        logits[0, 1, where] = float(bad)
    rows, labels = torch.arange(3), torch.tensor([1, label, 2])
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    others, _ = cpu.token_logp_fwd(clean, rows, labels, 1.0, 0.0)
    assert torch.equal(logp[[0, 2]], others[[0, 2]]), "other rows are untouched"
    coef, out = torch.ones(3, dtype=accumulator(dtype)), torch.empty_like(logits)
    cpu.token_logp_bwd(logits, row_of(rows, 3), labels, lse, coef, None, 1.0, 0.0, out)
    if bad == "-inf label":
        assert logp[1] == -math.inf and out[0, 1, label] == 1.0 and torch.isfinite(out[0, 1]).all()
    else:
        assert logp[1].isnan() and out[0, 1].isnan().all()
    assert torch.isfinite(out[0, [0, 2]]).all()


def test_labels_and_rows_out_of_range_give_nan(isa):
    logits = random_logits(torch.float32, 1, 3, 40)
    labels = torch.tensor([-2, 40, 2**62, -(2**62), 3, 3, 3])
    rows = torch.tensor([0, 1, 2, 0, -1, 3, 2**60])
    logp, _ = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    assert logp.isnan().all()
    guarded = torch.full((3 * 40 + 64,), 7.0)
    out = guarded[32:-32].view(1, 3, 40)
    lse, coef = torch.zeros(3, dtype=torch.float64), torch.ones(3)
    table, labels = torch.tensor([0, 5, 1], dtype=torch.int32), torch.tensor([-2, 40, 0])
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, 1.0, 0.0, out)
    assert out[0, [0, 2]].isnan().all() and (out[0, 1] == 0).all()
    assert (guarded[:32] == 7).all() and (guarded[-32:] == 7).all()


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_label_in_this_shard(isa, dtype, mapping):
    """Label -1: logp is -lse, and the gradient is that of a softmax without its one-hot term."""
    (a, c), (logits, rows, labels, table, coef) = MAPS[mapping], make(dtype, 777)
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, a, c)
    none = torch.full_like(labels, -1)
    logp_none, lse_none = cpu.token_logp_fwd(logits, rows, none, a, c)
    assert torch.equal(lse_none, lse) and torch.equal(logp_none, (-lse).to(logp.dtype))
    out, out_none = torch.empty_like(logits), torch.empty_like(logits)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, a, c, out)
    cpu.token_logp_bwd(logits, table, none, lse, coef, None, a, c, out_none)
    needed = logits.double().view(8, 777)[rows]
    slope = torch.full_like(needed, a) if c == 0 else c * a * (1 - torch.tanh(a * needed) ** 2)
    onehot = torch.nn.functional.one_hot(labels, 777)
    difference = (out.double() - out_none.double()).view(8, 777)[rows]
    expected = coef.double()[:, None] * onehot * slope
    torch.testing.assert_close(difference, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_gradient_are_not_read(isa, dtype):
    logits, rows, labels, table, coef = make(dtype, 300)
    _, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    coef[2] = 0.0
    logits.view(8, 300)[table < 0] = math.nan
    logits.view(8, 300)[rows[2]] = math.nan
    out = torch.full_like(logits, math.nan)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, 1.0, 0.0, out)
    flat = out.view(8, 300)
    assert torch.isfinite(flat).all() and (flat[table < 0] == 0).all() and (flat[rows[2]] == 0).all()
    assert flat[rows[0]].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_multiplies_coef(isa, dtype):
    logits, rows, labels, table, coef = make(dtype, 513)
    _, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    outs = [torch.empty_like(logits) for _ in range(3)]
    cpu.token_logp_bwd(logits, table, labels, lse, coef, torch.tensor(-4.0), 1.0, 0.0, outs[0])
    cpu.token_logp_bwd(logits, table, labels, lse, -4.0 * coef, None, 1.0, 0.0, outs[1])
    cpu.token_logp_bwd(logits, table, labels, lse, coef, torch.tensor(0.0, dtype=torch.float64), 1.0, 0.0, outs[2])
    assert torch.equal(outs[0], outs[1]) and (outs[2] == 0).all()


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_not_finite_makes_its_row_nan(isa, factor):
    logits, rows, labels, table, coef = make(torch.bfloat16, 100)
    _, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    coef[1] = factor
    out = torch.empty_like(logits)
    cpu.token_logp_bwd(logits, table, labels, lse, coef, None, 1.0, 0.0, out)
    flat = out.view(8, 100)
    assert flat[rows[1]].isnan().all() and torch.isfinite(flat[rows[[0, 2, 3, 4]]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_outputs_and_thread_counts_give_the_same_bits(isa, dtype, threads):
    """33 MiB and more: fresh memory, memory in use (streaming stores), in place; 1, 2 and 5 threads; unaligned rows."""
    V = 70001
    T = (33 << 20) // (V * dtype.itemsize) + 2
    logits = random_logits(dtype, 1, T, 2000).repeat(1, 1, 36)[..., :V].contiguous()
    rows, labels = torch.arange(T), torch.arange(T) * 37 % V
    coef = torch.linspace(-1, 1, T)
    results = []
    for count in (1, 2, 5):
        threads(count)
        logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
        out = torch.empty_like(logits)
        cpu.token_logp_bwd(logits, row_of(rows, T), labels, lse, coef, None, 1.0, 0.0, out)
        fresh = out.clone()
        out.fill_(math.nan)
        cpu.token_logp_bwd(logits, row_of(rows, T), labels, lse, coef, None, 1.0, 0.0, out)
        assert torch.equal(out, fresh), "memory in use and fresh memory differ"
        results.append((logp, lse, out))
    over = logits.clone()
    cpu.token_logp_bwd(over, row_of(rows, T), labels, lse, coef, None, 1.0, 0.0, over)
    for logp, lse_, out in results:
        assert torch.equal(logp, results[0][0]) and torch.equal(lse_, results[0][1])
        assert torch.equal(out, over), "in place and a new buffer differ"


def test_the_address_of_the_logits_does_not_matter(isa):
    logits, rows, labels, *_ = make(torch.float32, 4999)
    expected = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    for offset in range(1, 17, 3):
        moved = torch.empty(logits.numel() + 17)[offset : offset + logits.numel()].view_as(logits).copy_(logits)
        got = cpu.token_logp_fwd(moved, rows, labels, 1.0, 0.0)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (2, 4, 8)])
def test_nothing_to_do(isa, shape):
    logits, none = torch.randn(shape), torch.empty(0, dtype=torch.int64)
    logp, lse = cpu.token_logp_fwd(logits, none, none, 1.0, 0.0)
    assert logp.shape == lse.shape == (0,)
    out = torch.full(shape, math.nan)
    table = torch.full((shape[0] * shape[1],), -1, dtype=torch.int32)
    cpu.token_logp_bwd(logits, table, none, lse, logp, None, 1.0, 0.0, out)
    assert (out == 0).all()


def test_offsets_beyond_32_bits(isa):
    """A row 2^31 elements behind the first; only the pages that hold rows are ever touched."""
    stride, V = 2**31, 1000
    storage = torch.empty(stride + V, dtype=torch.bfloat16)
    logits = storage.as_strided((1, 2, V), (0, stride, 1))
    logits.copy_(torch.randn(1, 2, V))
    rows, labels = torch.tensor([1]), torch.tensor([3])
    logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    expected, expected_lse = cpu.token_logp_fwd(logits[:, 1:].contiguous(), torch.tensor([0]), labels, 1.0, 0.0)
    assert torch.equal(logp, expected)
    cpu.token_logp_bwd(logits, row_of(rows, 2), labels, lse, torch.ones(1), None, 1.0, 0.0, logits)
    assert (logits[0, 0] == 0).all() and logits[0, 1, 3] > 0 and abs(logits[0, 1].double().sum()) < 1e-2


def test_instruction_sets_agree(monkeypatch):
    logits, rows, labels, table, coef = make(torch.float32, 3001)
    results = []
    for name in ISAS:
        monkeypatch.setenv("SSPO_CPU_ISA", name)
        logp, lse = cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
        out = torch.empty_like(logits)
        cpu.token_logp_bwd(logits, table, labels, lse, coef, None, 1.0, 0.0, out)
        results.append((logp, out))
    for logp, out in results:
        torch.testing.assert_close(logp, results[0][0], rtol=0, atol=4e-6)
        torch.testing.assert_close(out, results[0][1], rtol=1e-5, atol=1e-9)


def test_isa_choice(monkeypatch):
    logits, rows, labels, *_ = make(torch.float32, 8)
    monkeypatch.setenv("SSPO_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="SSPO_CPU_ISA must be one of baseline, avx2, avx512, got 'sse9'"):
        cpu.token_logp_fwd(logits, rows, labels, 1.0, 0.0)
    monkeypatch.setenv("SSPO_CPU_ISA", "")
    assert cpu._C.isa() == ISAS[-1] and cpu.info()[ISAS[-1]] == "in use"
    for name, reason in cpu._C.isas().items():
        if reason:
            monkeypatch.setenv("SSPO_CPU_ISA", name)
            with pytest.raises(RuntimeError, match=f"SSPO_CPU_ISA={name} cannot run here"):
                cpu._C.isa()


def test_why_not_and_refused_arguments():
    assert cpu.why_not(torch.device("cpu"), torch.float16) is None
    assert "not on cuda" in cpu.why_not(torch.device("cuda"), torch.float32)
    assert "float32, bfloat16" in cpu.why_not(torch.device("cpu"), torch.int64)
    logits, rows, labels, table, coef = make(torch.float32, 8)
    with pytest.raises(TypeError, match="contiguous last dimension"):
        cpu.token_logp_fwd(logits.transpose(1, 2), rows, labels, 1.0, 0.0)
    with pytest.raises(TypeError, match="5 torch.int64"):
        cpu.token_logp_fwd(logits, rows, labels.int(), 1.0, 0.0)
    rest = (labels, coef.double(), coef, None, 1.0, 0.0)
    with pytest.raises(TypeError, match="8 torch.int32"):
        cpu.token_logp_bwd(logits, table[1:], *rest, torch.empty_like(logits))
    with pytest.raises(TypeError, match="out: expected"):
        cpu.token_logp_bwd(logits, table, *rest, logits.double())
    with pytest.raises(ValueError, match="out: overlaps"):
        cpu.token_logp_bwd(logits[:, ::2], table[:4], *rest, logits[:, :2])


def test_a_module_that_does_not_import_keeps_its_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_import_error", "undefined symbol: x")
    reason = cpu.why_not(torch.device("cpu"), torch.float32)
    assert "undefined symbol: x" in reason and "SSPO_BUILD_CPP" in reason and cpu.info() == {}


# ------------------------------------------------------------------------------------------------------- step_loss_fwd


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
