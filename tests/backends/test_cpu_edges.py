# SPDX-License-Identifier: Apache-2.0
"""The log-prob kernels of csrc/cpu at the edges: labels, rows and numbers out of range, thread counts."""

import math

import pytest
import torch
from helpers.cpu_rows import DTYPES, ISAS, MAPS, NOT_BUILT, accumulator, make, random_logits, row_of

from sspo_ext.backends import cpu

pytestmark = pytest.mark.skipif(bool(NOT_BUILT), reason=str(NOT_BUILT))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
