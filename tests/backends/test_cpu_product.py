# SPDX-License-Identifier: Apache-2.0
"""The CPU's own product of bfloat16 matrices into a float32 sum.

Faults planted in the C++, each caught: test_cpu_sanitizers.py. Mutations of the wrapper: `first` turned round
(test_against_float64), the order of strides (test_against_float64), a check of a dtype or a shape left out
(test_wrong_tensors_are_refused).
"""

import pytest
import torch

from sspo_ext.backends import cpu

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
pytestmark = pytest.mark.skipif(cpu.product_why_not() is not None, reason=str(cpu.product_why_not()))


def operands(n, V, H, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=g).to(BF16), torch.randn(n, H, generator=g).to(BF16)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 600])
@pytest.mark.parametrize(("V", "H"), [(1, 1), (5, 63), (6, 64), (97, 65), (191, 130), (96, 16)])
def test_against_float64(n, V, H):
    """Sums inside a larger buffer: what lies around them stays."""
    gradient, hidden = operands(n, V, H)
    truth, scale = (a.to(F64).t() @ b.to(F64) for a, b in ((gradient, hidden), (gradient.abs(), hidden.abs())))
    around = torch.full((V + 2, H + 9), 7.0)
    total = around[1:-1, 4 : 4 + H]
    cpu.add_product(total, gradient, hidden, True)
    bound = (n + 2) * torch.finfo(F32).eps * scale
    assert ((total - truth).abs() <= bound).all()
    cpu.add_product(total, gradient, hidden, False)
    assert ((total - 2 * truth).abs() <= 3 * bound).all()
    total.fill_(7.0)
    assert (around == 7).all()


def test_nan_is_not_read_where_total_is_written():
    gradient, hidden = operands(9, 40, 33)
    total = torch.full((40, 33), float("nan"))
    cpu.add_product(total, gradient, hidden, True)
    assert total.isfinite().all()
    gradient[3, 5] = float("inf")
    cpu.add_product(total, gradient, hidden, False)
    assert total[5].isinf().all() and total[:5].isfinite().all() and total[6:].isfinite().all()


def test_threads_change_no_bit():
    gradient, hidden = operands(301, 3000, 256)  # three blocks of a megabyte
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            total = torch.ones(3000, 256)
            cpu.add_product(total, gradient, hidden, False)
            results.append(total)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_another_instruction_set_has_none(monkeypatch):
    monkeypatch.setenv("SSPO_CPU_ISA", "baseline")
    assert cpu.product_why_not() == "the instruction set in use is not avx512"
    with pytest.raises(RuntimeError, match="is not avx512"):
        cpu.add_product(torch.zeros(2, 3), *operands(4, 2, 3), True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("total", lambda t, g, h: (t.to(F64), g, h)),
        ("total", lambda t, g, h: (t[:1], g, h)),
        ("gradient", lambda t, g, h: (t, g.float(), h)),
        ("gradient", lambda t, g, h: (t, g.t().contiguous().t(), h)),
        ("hidden", lambda t, g, h: (t, g, h[:2])),
        ("hidden", lambda t, g, h: (t, g, h.half())),
    ],
)
def test_wrong_tensors_are_refused(name, change):
    with pytest.raises(TypeError, match=name):
        cpu.add_product(*change(torch.zeros(2, 3), *operands(4, 2, 3)), False)
