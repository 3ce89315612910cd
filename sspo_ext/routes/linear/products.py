# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit matrices that are added up in float32 without being rounded to 16 bits first."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ...backends import cpu

# Of float32 temporaries where no library has such a product: about a core's cache; on a GPU, few launches.
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 4 << 20, 256 << 20


def add_product(
    total: Tensor,  # (V, H) float32, contiguous; overwritten if `first`
    gradient: Tensor,  # (n, V) 16-bit, rows contiguous
    hidden: Tensor,  # (n, H) 16-bit, rows contiguous
    first: bool,
) -> None:
    """Total += gradient^T @ hidden, and nothing is rounded to 16 bits on the way.

    CUDA: `addmm` with `out_dtype` (torch 2.10). CPUs: `cpu_bfloat16`. Elsewhere the operands become float32, a block of
    vocabulary rows at a time: right everywhere.
    """
    on_cpu = total.device.type == "cpu"
    if not on_cpu and gpu_products_in_float32():
        if first:
            torch.mm(gradient.t(), hidden, out_dtype=torch.float32, out=total)
        elif gpu_sums_in_float32():
            torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            for rows in _blocks(total, total.shape[1]):
                total[rows].add_(torch.mm(gradient[:, rows].t(), hidden, out_dtype=torch.float32))
        return
    in_bfloat16 = cpu_bfloat16() if on_cpu and gradient.dtype == torch.bfloat16 else None
    if in_bfloat16 is not None and gradient.numel() and hidden.numel():
        in_bfloat16(total, gradient, hidden, first)
        return
    wide = hidden.float()
    for rows in _blocks(total, max(gradient.shape[0], hidden.shape[1])):
        total[rows].addmm_(gradient[:, rows].float().t(), wide, beta=0.0 if first else 1.0)


def _blocks(total: Tensor, columns: int) -> Iterator[slice]:
    """Rows of `total` for which (rows, columns) float32 temporaries are small."""
    budget = _BLOCK_BYTES if total.device.type == "cpu" else _GPU_BLOCK_BYTES
    block = max(1, budget // (4 * max(1, columns)))
    for start in range(0, total.shape[0], block):
        yield slice(start, start + block)


def add_columns(total: Tensor, gradient: Tensor) -> None:
    """Total (V,) += the sum of gradient (n, V) over its rows, in total's dtype."""
    if total.device.type != "cpu":  # one reduction, which widens what it reads
        total += gradient.sum(0, dtype=total.dtype)
        return
    # on a CPU a sum in a wider dtype copies its input first
    block = max(1, min(_BLOCK_BYTES, gradient.nbytes) // (max(1, gradient.shape[0]) * total.itemsize))
    for v in range(0, len(total), block):
        total[v : v + block] += gradient[:, v : v + block].sum(0, dtype=total.dtype)


@functools.cache
def gpu_products_in_float32() -> bool:
    """Whether torch's GEMMs on a GPU take 16-bit operands and give a float32 result."""
    return hasattr(torch.ops.aten.addmm, "dtype_out") and torch.version.hip is None


@functools.cache
def gpu_sums_in_float32() -> bool:
    """Whether such a product may be added to a float32 sum: torch 2.8 and 2.9 refuse it (pytorch#167931)."""
    return TorchVersion(torch.__version__) >= "2.10"


Product = Callable[[Tensor, Tensor, Tensor, bool], None]  # total, gradient, hidden, first


def cpu_bfloat16() -> Product | None:
    """This CPU's product of bfloat16 matrices into a float32 sum, or None where float32 operands are as fast.

    The instruction set decides, so a machine gives the same bits in every run. With matrix tiles (AMX): oneMKL's, which
    torch contains. With AVX512_BF16 alone: ours, since oneMKL uses these instructions on few processors, and on others
    takes as long as in float32 (measured: docs/gpu.md).
    """
    if _supports("amx_tile"):
        product = mkl_bfloat16()
        if product is not None:
            return product
    return cpu.add_product if cpu.product_why_not() is None else None


def _supports(name: str) -> bool:
    """Whether torch knows of these instructions, and finds them here."""
    supported = getattr(torch.cpu, f"_is_{name}_supported", None)
    return supported is not None and supported()


@functools.cache
def mkl_bfloat16() -> Product | None:
    """OneMKL's product of bfloat16 matrices into float32, or None where torch lacks it or the CPU would emulate it."""
    if not _supports("avx512_bf16"):
        return None
    try:
        gemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    number, size, pointer = ctypes.c_float, ctypes.c_int, ctypes.c_void_p
    gemm.argtypes = [size] * 6 + [number, pointer, size, pointer, size, number, pointer, size]
    gemm.restype = None
    row_major, no_transpose, transpose = 101, 111, 112

    def add(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
        for name, t, dtype in (("total", total, torch.float32), ("gradient", gradient, None), ("hidden", hidden, None)):
            assert t.dtype == (dtype or torch.bfloat16) and t.stride(1) == 1 and t.device.type == "cpu", name
        (n, vocab), size = gradient.shape, hidden.shape[1]
        assert hidden.shape[0] == n and total.shape == (vocab, size)
        gemm(
            row_major, transpose, no_transpose, vocab, size, n, 1.0, gradient.data_ptr(), gradient.stride(0),
            hidden.data_ptr(), hidden.stride(0), 0.0 if first else 1.0, total.data_ptr(), total.stride(0),
        )  # fmt: skip

    return add
