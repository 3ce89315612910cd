# SPDX-License-Identifier: Apache-2.0
"""Row backward: the gradient of every position's logits, written once.

A row with a coefficient is read once, the other rows not at all.
Rows are walked by the 16-byte boundaries of the *gradient's* row (rows.py). Where the logits' row has its boundaries at
other columns (a slice of a larger tensor with an odd V), its loads are narrow and the stores are still wide.
"""

import torch
import triton
import triton.language as tl

from .rows import (
    backward_map,
    column_shares,
    jit,
    label_and_edges,
    label_weight,
    lies_alike,
    load_tiles,
    nan_for_wrong_label,
    on_device,
    owns_label,
    row_launch,
    row_offset,
    row_share,
    row_shift,
    softcap_kind,
    store_tiles,
    tanh_sech2,
    write_zeros,
)


@triton.jit
def _grad(x, a, scale, shift, weight, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """Weight * softmax(z) * dz/dx; `weight` has the factors that are constant in the row."""
    if SOFTCAP:
        u, sech2 = tanh_sech2(a * x, SOFTCAP, VEC)
        return tl.exp2(tl.fma(u, scale, shift)) * (weight * sech2)
    else:
        return tl.exp2(tl.fma(x, scale, shift)) * weight


@triton.jit
def _write_tiles(
    out_ptr, logits_ptr, lanes, a, scale, shift, centre, weight,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    x0, x1, x2, x3 = load_tiles(logits_ptr, lanes, MASKED, ALIGNED, LANES, VEC)
    if MASKED:  # a row far from 0 has masked passes only
        x0 -= centre
        x1 -= centre
        x2 -= centre
        x3 -= centre
    x0 = _grad(x0, a, scale, shift, weight, SOFTCAP, VEC)
    x1 = _grad(x1, a, scale, shift, weight, SOFTCAP, VEC)
    x2 = _grad(x2, a, scale, shift, weight, SOFTCAP, VEC)
    x3 = _grad(x3, a, scale, shift, weight, SOFTCAP, VEC)
    store_tiles(out_ptr, x0, x1, x2, x3, lanes, MASKED, LANES, VEC)


@jit
def _token_logp_bwd_kernel(
    logits_ptr,  # (B, T, V)
    row_of_ptr,  # (B * T,) int32
    labels_ptr,  # (N,) int64; -1: in another shard, no one-hot term; others outside [0, V): NaN
    lse_ptr,  # (N,) float64
    coef_ptr,  # (N,) float32
    upstream_ptr,  # () or not read
    out_ptr,  # (B, T, V), may be the logits
    T: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    V: tl.int32,
    a: tl.float32,  # with SOFTCAP, u = tanh(a * x); else u = x
    slope: tl.float32,  # dz/dx, without the softcap's 1 - u^2
    scale: tl.float32,  # z / (u * ln 2)
    per_lse: tl.float32,  # `scale` as rounded, over z / u, in two parts: what brings lse to the units of scale * u
    per_lse_lost: tl.float32,
    HAS_UPSTREAM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of the logits has its 16-byte boundaries where its gradient has
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row_offset(i, T, stride_ob, stride_ot)
    lead, groups, begin, loop_end, end, columns, at_edge = row_share(out_row_ptr, V, LANES, VEC)
    out_body_ptr = tl.multiple_of(out_row_ptr + lead, 16)
    n = tl.load(row_of_ptr + i)
    coef = tl.load(coef_ptr + n, mask=n >= 0, other=0.0).to(tl.float32)
    if HAS_UPSTREAM:
        coef = tl.where(coef == 0.0, 0.0, coef * tl.load(upstream_ptr).to(tl.float32))
    if coef == 0.0:
        write_zeros(out_row_ptr, out_body_ptr, begin, loop_end, end, columns, at_edge, LANES, VEC)
    else:
        row_ptr = logits_ptr + row_offset(i, T, stride_lb, stride_lt)
        body_ptr = row_ptr + lead
        if ALIGNED:
            body_ptr = tl.multiple_of(body_ptr, 16)
        label = tl.load(labels_ptr + n)
        lse = tl.load(lse_ptr + n)
        # A large shift in float32 loses more than its exponential may: the row's factor has what was cut off.
        shift, lost, centre = row_shift(lse, scale, per_lse, per_lse_lost, SOFTCAP)
        loop_end = tl.where(centre == 0.0, loop_end, begin)
        weight = nan_for_wrong_label(coef * slope, label, V)
        softmax_weight = -weight * tl.exp2(lost)

        # In place, these must be read before anything is written, and the label's gradient is written last.
        mine = owns_label(label, lead, groups, begin, end, V, VEC)
        x_label, x_edge = label_and_edges(row_ptr, label, mine, columns, at_edge)
        x_label -= centre
        x_edge -= centre
        tl.debug_barrier()
        for g in range(begin, loop_end, 4 * LANES):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, 0, a, scale, shift, centre, softmax_weight,
                False, SOFTCAP, ALIGNED, LANES, VEC,
            )  # fmt: skip
        for g in range(loop_end, end, 4 * LANES):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, end - g, a, scale, shift, centre, softmax_weight,
                True, SOFTCAP, ALIGNED, LANES, VEC,
            )  # fmt: skip
        d_edge = _grad(x_edge, a, scale, shift, softmax_weight, SOFTCAP, VEC)
        tl.store(out_row_ptr + columns, d_edge.to(out_ptr.dtype.element_ty), mask=at_edge)
        tl.debug_barrier()
        weight = label_weight(weight, x_label, a, SOFTCAP, VEC)
        d_label = weight + _grad(x_label, a, scale, shift, softmax_weight, SOFTCAP, VEC)
        tl.store(out_row_ptr + label, d_label.to(out_ptr.dtype.element_ty), mask=mine)


def token_logp_bwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous
    row_of: torch.Tensor,  # (B * T,) int32: row n of the position, or -1
    labels: torch.Tensor,  # (N,) int64; -1: no one-hot term; others outside [0, V): a row of NaN
    lse: torch.Tensor,  # (N,) float64
    coef: torch.Tensor,  # (N,) float32: dL/dlogp
    upstream: torch.Tensor | None,  # () multiplies coef
    a: float,
    c: float,
    out: torch.Tensor,  # (B, T, V) like logits, or the logits themselves
) -> None:
    """out[i, v] = upstream * coef * (onehot - softmax(z))[v] * dz/dx. Zeros where nothing is scored or coef is 0."""
    assert out.dtype == logits.dtype and out.shape == logits.shape and out.stride(-1) == 1
    B, T, V = logits.shape
    if B * T * V == 0:
        return
    launch = row_launch(V, logits.dtype)
    vec = launch["VEC"]
    grid = (B * T, column_shares(B * T, V, 4 * launch["LANES"] * vec))
    with on_device(logits):
        _token_logp_bwd_kernel[grid](
            logits, row_of, labels, lse, coef, coef if upstream is None else upstream, out,
            T, *logits.stride()[:2], *out.stride()[:2], V, *backward_map(a, c),
            HAS_UPSTREAM=upstream is not None, SOFTCAP=softcap_kind(c), ALIGNED=lies_alike(logits, out, vec), **launch,
        )  # fmt: skip
