# SPDX-License-Identifier: Apache-2.0
"""The three products of a chunk. Where several chunks are added up in float32, none is rounded to 16 bits first."""

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


def project(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    out: Tensor,  # (n, V)
) -> Tensor:
    """Writes hidden @ weight^T + bias."""
    if not _widens(weight):
        return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)
    wide = hidden.float()
    for rows in _blocks(weight, max(hidden.shape)):
        product = wide @ weight[rows].float().t()
        out[:, rows] = product if bias is None else product.add_(bias[rows])
    return out


def project_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """(n, H): gradient (n, V) @ weight (V, H)."""
    if not _widens(weight):
        return torch.mm(gradient, weight)
    total = torch.zeros(gradient.shape[0], weight.shape[1])
    for rows in _blocks(weight, max(total.shape)):
        total.addmm_(gradient[:, rows].float(), weight[rows].float())
    return total.to(gradient.dtype)


def add_product_in_place(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """As `add_product`, for a total of the operands' dtype: it is rounded once a call."""
    if not _widens(hidden):
        torch.mm(gradient.t(), hidden, out=total) if first else total.addmm_(gradient.t(), hidden)
        return
    wide = hidden.float()
    for rows in _blocks(total, max(hidden.shape)):
        product = gradient[:, rows].float().t() @ wide
        total[rows] = product if first else product.add_(total[rows])


def _widens(operand: Tensor) -> bool:
    """Whether float32 copies of 16-bit operands, a block at a time, are multiplied instead.

    A CPU without instructions for the dtype: torch may take 200 times as long as in float32 (docs/results).
    """
    return operand.device.type == "cpu" and operand.itemsize == 2 and not cpu_multiplies(operand.dtype)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of this 16-bit dtype on this CPU: oneDNN's, which it then takes."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and supported()


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
    for rows in _blocks(total, max(hidden.shape)):
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
    takes as long as in float32 (measured: docs/results).
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
