# SPDX-License-Identifier: Apache-2.0
"""The scaling of a kept gradient: one read and one write, in place or not."""

import torch
import triton
import triton.language as tl

from .rows import jit, lies_alike, on_device

_WARPS = 4


@triton.jit
def _scale_block(kept_ptr, out_ptr, c, end, C, scale, BLOCK: tl.constexpr):
    o = c + tl.arange(0, BLOCK)
    x = tl.load(kept_ptr + o, mask=o < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, (x * scale).to(out_ptr.dtype.element_ty), mask=o < C)


@jit
def _scale_rows_kernel(
    kept_ptr,  # (R, C)
    scale_ptr,  # (R,), any stride
    out_ptr,  # (R, C), may be kept
    stride_kept: tl.int64,
    stride_scale: tl.int64,
    stride_out: tl.int64,
    C: tl.int32,
    ALIGNED: tl.constexpr,  # rows begin and end at 16-byte boundaries
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,  # elements in 16 bytes
):
    r = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + r * stride_scale).to(tl.float32)
    # a row of scale 0 is not read: it becomes zeros, whatever it held
    end = tl.where(scale == 0.0, 0, C)
    kept_row_ptr = kept_ptr + r * stride_kept
    out_row_ptr = out_ptr + r * stride_out
    if ALIGNED:
        kept_row_ptr = tl.multiple_of(kept_row_ptr, 16)
        out_row_ptr = tl.multiple_of(out_row_ptr, 16)
        C = C // VEC * VEC  # which the compiler then knows
        end = tl.multiple_of(end, VEC)
    for c in range(0, C, BLOCK):
        _scale_block(kept_row_ptr, out_row_ptr, c, end, C, scale, BLOCK)


def scale_rows(
    kept: torch.Tensor,  # (R, C) float32, bfloat16 or float16; last dimension contiguous
    scale: torch.Tensor,  # (R,) float, any stride: an expanded scalar has 0
    out: torch.Tensor,  # (R, C) like kept, or kept itself
) -> None:
    """out[r, c] = scale[r] * kept[r, c], in float32 and rounded once; zeros where the scale is 0."""
    assert out.shape == kept.shape and out.dtype == kept.dtype and kept.stride(1) == out.stride(1) == 1
    R, C = kept.shape
    if R * C == 0:
        return
    vec = 16 // kept.itemsize
    aligned = C % vec == 0 and kept.data_ptr() % 16 == 0 and kept.stride(0) % vec == 0
    aligned = aligned and lies_alike(kept[None], out[None], vec)
    with on_device(kept):
        _scale_rows_kernel[(R,)](
            kept, scale, out, kept.stride(0), scale.stride(0), out.stride(0), C,
            ALIGNED=aligned, BLOCK=32 * _WARPS * vec, VEC=vec, num_warps=_WARPS,
        )  # fmt: skip
