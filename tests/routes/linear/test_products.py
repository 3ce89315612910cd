# SPDX-License-Identifier: Apache-2.0
"""Products that are summed in float32: no chunk's product is rounded to 16 bits first.

Mutations, and the test that catches each: a product in bfloat16, then added (test_product_is_not_rounded,
test_many_chunks_are_as_exact_as_one); the first product added instead of written (test_product_is_not_rounded); oneMKL
asked for a CPU without matrix tiles (test_the_processor_decides); a bias added twice, blocks of dH that overwrite
(test_the_rule_holds_with_float32_copies_and_without).
"""

import pytest
import torch
from helpers.linear import layout_of_lengths, pairs_of, problem, truth_of
from helpers.linear_route import BF16, F16, F32, F64, SHAPE, assert_rule, linear_route, units_batch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import ledger
from sspo_ext.backends import cpu
from sspo_ext.routes.linear import products


def _blocks():
    return None


WAYS = {"ours": lambda: cpu.add_product, "oneMKL": products.mkl_bfloat16, "float32 blocks": _blocks}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The ways to a product of bfloat16 matrices on a CPU, where this CPU, torch and the build have them."""
    if request.param == "ours" and cpu.product_why_not() is not None:
        pytest.skip(cpu.product_why_not())
    if request.param == "oneMKL" and products.mkl_bfloat16() is None:
        pytest.skip("torch here has no oneMKL, or the CPU no bfloat16 instructions")
    monkeypatch.setattr(products, "cpu_bfloat16", WAYS[request.param])
    monkeypatch.setattr(products, "_BLOCK_BYTES", 1 << 12)
    return request.param


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("n", "V", "H"), [(1, 1, 1), (7, 33, 5), (130, 257, 64), (0, 9, 3), (257, 101, 65)])
def test_product_is_not_rounded(way, dtype, n, V, H):
    g = torch.Generator().manual_seed(n)
    padded = torch.randn(n, V + 13, generator=g).to(dtype)
    gradient, hidden = padded[:, :V], torch.randn(n, H + 3, generator=g).to(dtype)[:, :H]
    truth = gradient.to(F64).t() @ hidden.to(F64)
    total = torch.full((V, H), float("nan"))
    products.add_product(total, gradient, hidden, True)
    products.add_product(total, gradient, hidden, False)
    scale = gradient.to(F64).abs().t() @ hidden.to(F64).abs()  # what float32 sums of n products may be off by
    assert ((total - 2 * truth).abs() <= 2 * (n + 2) * torch.finfo(F32).eps * scale).all()


def test_many_chunks_are_as_exact_as_one(way):
    """The gradient of a bfloat16 head over 64 chunks, against float64: at most 1.1 times the error of one chunk."""
    V, H, rows = 61, 48, 64
    layout = layout_of_lengths([32] * 128, V)
    pairs = pairs_of(layout, *((2 * k, 2 * k + 1) for k in range(64)))
    p = problem(layout.shape, V, H, bias=False, hidden_dtype=BF16, weight_dtype=BF16)
    truth = truth_of(p, layout, pairs)[2]

    def error(rows_a_chunk):
        got = linear_route(p, layout, pairs, rows=rows_a_chunk)[2]
        return (got.to(F64) - truth).square().mean().sqrt().item()

    one, many = error(layout.num_rows), error(rows)
    assert many <= 1.1 * one, (many, one)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("rows", [10_000, 5])
def test_the_rule_holds_with_float32_copies_and_without(monkeypatch, dtype, multiplies, rows):
    """Loss and gradients by the 16-bit products of torch, and by blocks of float32 copies of a few rows each."""
    widened = []
    monkeypatch.setattr(products, "cpu_multiplies", lambda of: widened.append(of) or multiplies)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 1 << 11)
    layout, pairs, options = units_batch()
    p = problem(SHAPE, hidden_dtype=dtype, weight_dtype=dtype)
    assert_rule(p, layout, pairs, rows=rows, **options)
    assert set(widened) == {dtype}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_sum_in_16_bits(monkeypatch, dtype, multiplies):
    """`accum_dtype` of the weight: the sum itself is rounded, once a call."""
    monkeypatch.setattr(products, "cpu_multiplies", lambda dtype: multiplies)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 1 << 10)
    g = torch.Generator().manual_seed(0)
    gradient, hidden = (torch.randn(20, size, generator=g).to(dtype) for size in (57, 11))
    truth = gradient.to(F64).t() @ hidden.to(F64)
    total = torch.full((57, 11), float("nan"), dtype=dtype)
    for k in (1, 2):
        products.add_product_in_place(total, gradient, hidden, k == 1)
        assert ((total - k * truth).abs() <= k * torch.finfo(dtype).eps * (k * truth).abs() + 1e-4).all()


class _Products(TorchDispatchMode):
    """Asserts that no 16-bit matrices are multiplied; counts products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.overloadpacket.__name__:
            self.count += 1
            assert all(t.itemsize == 4 for t in args if isinstance(t, torch.Tensor)), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_without_instructions_all_products_are_float32(monkeypatch, dtype):
    """Where torch would multiply element by element, and take 200 times as long."""
    monkeypatch.setattr(products, "cpu_multiplies", lambda dtype: False)
    hidden, weight, logits = (torch.ones(shape, dtype=dtype) for shape in ((3, 5), (7, 5), (3, 7)))
    with _Products() as seen:
        products.project(hidden, weight, None, logits)
        products.project(hidden, weight, weight[:, 0], logits)
        products.project_back(logits, weight)
        for first in (True, False):
            products.add_product_in_place(weight, logits, hidden, first)
    assert seen.count == 5


def test_the_processor_decides(monkeypatch):
    """Matrix tiles: oneMKL. AVX512_BF16 alone: ours. Neither: None, float32 blocks. Never a trial, never by vendor."""
    here = {"amx_tile": True, "avx512_bf16": True}
    monkeypatch.setattr(products, "_supports", here.get)
    monkeypatch.setattr(products, "mkl_bfloat16", lambda: len)
    monkeypatch.setattr(cpu, "product_why_not", lambda: None)
    assert products.cpu_bfloat16() is len
    here["amx_tile"] = False
    assert products.cpu_bfloat16() is cpu.add_product
    monkeypatch.setattr(cpu, "product_why_not", lambda: "not built")
    assert products.cpu_bfloat16() is None


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_columns(dtype):
    gradient = torch.randn(9, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.ones(301)
    products.add_columns(total, gradient)
    torch.testing.assert_close(total, 1 + gradient.float().sum(0))


@pytest.mark.skipif(not products.gpu_products_in_float32(), reason="before torch 2.8 no product is float32")
@pytest.mark.parametrize("sums", [True, False])
def test_what_a_gpu_is_asked_for(monkeypatch, sums):
    """On meta tensors: torch 2.10 adds a product to a float32 sum; 2.8 and 2.9 make the product, a few blocks each."""
    monkeypatch.setattr(products, "gpu_sums_in_float32", lambda: sums)
    total = torch.empty(151936, 4096, device="meta")
    gradient, hidden = (torch.empty(64, size, dtype=BF16, device="meta") for size in (151936, 4096))
    with ledger.record() as launched:
        products.add_product(total, gradient, hidden, True)
        products.add_product(total, gradient, hidden, False)
    assert launched.names("gemm") == ({"mm": 1, "addmm": 1} if sums else {"mm": 11})
    assert launched.launches == (2 if sums else 21)
