# SPDX-License-Identifier: Apache-2.0
"""Row backward with further reductions: one read of each tensor, one write.

The gradients arrive at the log-prob, entropy, sum of squares and KL together.
Rows are walked by the gradient's 16-byte boundaries, as in token_logp_bwd.py.
"""

import torch
import triton
import triton.language as tl

from .row_reductions_fwd import LEAST_EXPONENT
from .rows import (
    LN2,
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
def _grad(
    x, y, a, scale, shift, ref_shift, power, constant, log_p, square, kappa,
    SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """P (constant + log_p t + square p) - kappa q, times the softcap's share of dz/dx, where p = power * 2^t."""
    if SOFTCAP:
        u, sech2 = tanh_sech2(a * x, SOFTCAP, VEC)
    else:
        u = x
    t = tl.fma(u, scale, shift)
    p = tl.exp2(t) * power
    d = p * tl.fma(square, p, tl.fma(log_p, tl.maximum(t, LEAST_EXPONENT), constant))
    if HAS_REF:
        if SOFTCAP:
            y, _ = tanh_sech2(a * y, SOFTCAP, VEC)
        d = tl.fma(-kappa, tl.exp2(tl.fma(y, scale, ref_shift)), d)
    if SOFTCAP:
        d *= sech2
    return d


@triton.jit
def _write_tiles(
    out_ptr, logits_ptr, ref_ptr, lanes, a, scale, shift, ref_shift, centre, ref_centre, power, constant, log_p, square,
    kappa,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, ALIGNED: tl.constexpr,
    REF_ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    x0, x1, x2, x3 = load_tiles(logits_ptr, lanes, MASKED, ALIGNED, LANES, VEC)
    if HAS_REF:
        y0, y1, y2, y3 = load_tiles(ref_ptr, lanes, MASKED, REF_ALIGNED, LANES, VEC)
    else:
        y0, y1, y2, y3 = x0, x1, x2, x3
    if MASKED:  # a row far from 0 has masked passes only
        x0 -= centre
        x1 -= centre
        x2 -= centre
        x3 -= centre
        y0 -= ref_centre
        y1 -= ref_centre
        y2 -= ref_centre
        y3 -= ref_centre
    x0 = _grad(x0, y0, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC)
    x1 = _grad(x1, y1, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC)
    x2 = _grad(x2, y2, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC)
    x3 = _grad(x3, y3, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC)
    store_tiles(out_ptr, x0, x1, x2, x3, lanes, MASKED, LANES, VEC)


@triton.jit
def _coefs_but_constant(coefs_ptr, n, HAS_REF: tl.constexpr):
    """(g, log_p, square, kappa) of row n, zeros where nothing is scored. If all are 0, so is the row's gradient."""
    scored = n >= 0
    coefs_ptr += n.to(tl.int64) * 5
    g_label = tl.load(coefs_ptr, mask=scored, other=0.0)
    log_p = tl.load(coefs_ptr + 2, mask=scored, other=0.0)
    square = tl.load(coefs_ptr + 3, mask=scored, other=0.0)
    kappa = tl.zeros([], tl.float32)
    if HAS_REF:
        kappa = tl.load(coefs_ptr + 4, mask=scored, other=0.0)
    return g_label, log_p, square, kappa


@triton.jit
def _terms(constant, g_label, log_p, square, lse, slope, scale, per_lse, per_lse_lost, SOFTCAP: tl.constexpr):
    """(shift, centre, power, constant, log_p, square) as `_grad` takes them."""
    shift, lost, centre = row_shift(lse, scale, per_lse, per_lse_lost, SOFTCAP)
    power = tl.exp2(lost)
    # log p = ln 2 (t + lost)
    constant = slope * (constant - g_label + log_p * lost * LN2)
    return shift, centre, power, constant, slope * (log_p * LN2), slope * square


@jit
def _row_reductions_bwd_kernel(
    logits_ptr,  # (B, T, V)
    ref_logits_ptr,  # (B, T, V) or not read
    row_of_ptr,  # (B * T,) int32
    labels_ptr,  # (N,) int64; -1: in another shard, no one-hot term; others outside [0, V): NaN
    lse_ptr,  # (N,) float64
    ref_lse_ptr,  # (N,) float64 or not read
    coefs_ptr,  # (N, 5) float32
    out_ptr,  # (B, T, V), may be the logits
    T: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    stride_rb: tl.int64,
    stride_rt: tl.int64,
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    V: tl.int32,
    a: tl.float32,  # with SOFTCAP, u = tanh(a * x); else u = x
    slope: tl.float32,  # dz/dx, without the softcap's 1 - u^2
    scale: tl.float32,  # z / (u * ln 2)
    per_lse: tl.float32,  # `scale` as rounded, over z / u, in two parts: what brings lse to the units of scale * u
    per_lse_lost: tl.float32,
    SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of the logits has its 16-byte boundaries where its gradient has
    REF_ALIGNED: tl.constexpr,  # and that of the reference
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    out_row_ptr = out_ptr + row_offset(i, T, stride_ob, stride_ot)
    lead, groups, begin, loop_end, end, columns, at_edge = row_share(out_row_ptr, V, LANES, VEC)
    out_body_ptr = tl.multiple_of(out_row_ptr + lead, 16)
    n = tl.load(row_of_ptr + i)
    # Before the branch: behind it, ptxas gives the loop with KL of float32 more registers (61 for 47 on sm_90, read by
    # `python -m benchmarks machine-code`).
    label = tl.load(labels_ptr + n, mask=n >= 0, other=-1)
    g_label, log_p, square, kappa = _coefs_but_constant(coefs_ptr, n, HAS_REF)
    if (g_label == 0.0) & (log_p == 0.0) & (square == 0.0) & (kappa == 0.0):
        write_zeros(out_row_ptr, out_body_ptr, begin, loop_end, end, columns, at_edge, LANES, VEC)
    else:
        row_ptr = logits_ptr + row_offset(i, T, stride_lb, stride_lt)
        ref_row_ptr = ref_logits_ptr + row_offset(i, T, stride_rb, stride_rt)
        body_ptr = row_ptr + lead
        if ALIGNED:
            body_ptr = tl.multiple_of(body_ptr, 16)
        ref_body_ptr = ref_row_ptr + lead
        if REF_ALIGNED:
            ref_body_ptr = tl.multiple_of(ref_body_ptr, 16)
        shift, centre, power, constant, log_p, square = _terms(
            tl.load(coefs_ptr + n.to(tl.int64) * 5 + 1), g_label, log_p, square, tl.load(lse_ptr + n),
            slope, scale, per_lse, per_lse_lost, SOFTCAP,
        )  # fmt: skip
        constant = nan_for_wrong_label(constant, label, V)
        ref_shift = shift
        ref_centre = centre
        if HAS_REF:
            ref_lse = tl.load(ref_lse_ptr + n)
            ref_shift, ref_lost, ref_centre = row_shift(ref_lse, scale, per_lse, per_lse_lost, SOFTCAP)
            kappa = slope * kappa * tl.exp2(ref_lost)
        loop_end = tl.where((centre == 0.0) & (ref_centre == 0.0), loop_end, begin)

        # In place, these must be read before anything is written, and the label's gradient is written last.
        mine = owns_label(label, lead, groups, begin, end, V, VEC)
        x_label, x_edge = label_and_edges(row_ptr, label, mine, columns, at_edge)
        y_label = x_label
        y_edge = x_edge
        if HAS_REF:
            y_label, y_edge = label_and_edges(ref_row_ptr, label, mine, columns, at_edge)
        x_label -= centre
        x_edge -= centre
        y_label -= ref_centre
        y_edge -= ref_centre
        tl.debug_barrier()
        for g in range(begin, loop_end, 4 * LANES):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, ref_body_ptr + g * VEC, 0,
                a, scale, shift, ref_shift, centre, ref_centre, power, constant, log_p, square, kappa,
                False, SOFTCAP, HAS_REF, ALIGNED, REF_ALIGNED, LANES, VEC,
            )  # fmt: skip
        for g in range(loop_end, end, 4 * LANES):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, ref_body_ptr + g * VEC, end - g,
                a, scale, shift, ref_shift, centre, ref_centre, power, constant, log_p, square, kappa,
                True, SOFTCAP, HAS_REF, ALIGNED, REF_ALIGNED, LANES, VEC,
            )  # fmt: skip
        d_edge = _grad(
            x_edge, y_edge, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC
        )
        tl.store(out_row_ptr + columns, d_edge.to(out_ptr.dtype.element_ty), mask=at_edge)
        tl.debug_barrier()
        weight = label_weight(slope * g_label, x_label, a, SOFTCAP, VEC)
        d_label = weight + _grad(
            x_label, y_label, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC
        )
        tl.store(out_row_ptr + label, d_label.to(out_ptr.dtype.element_ty), mask=mine)


def row_reductions_bwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous
    row_of: torch.Tensor,  # (B * T,) int32: row n of the position, or -1
    labels: torch.Tensor,  # (N,) int64; -1: no one-hot term; others outside [0, V): a row of NaN
    lse: torch.Tensor,  # (N,) float64
    ref: torch.Tensor | None,
    ref_lse: torch.Tensor,  # (N,) float64; not read without a reference
    coefs: torch.Tensor,  # (N, 5) float32: g, constant, log_p, square, kappa
    a: float,
    c: float,
    out: torch.Tensor,  # (B, T, V) like logits, or the logits themselves
) -> None:
    """out[i, v] = (g (onehot - p)[v] + p[v] (constant + log_p log p[v] + square p[v]) - kappa q[v]) * dz/dx.

    p and q are the softmax of logits and reference. Zeros where nothing is scored, or all coefficients but `constant`
    are 0.
    """
    assert out.dtype == logits.dtype and out.shape == logits.shape and out.stride(-1) == 1
    B, T, V = logits.shape
    if B * T * V == 0:
        return
    launch = row_launch(V, logits.dtype)
    vec, other = launch["VEC"], logits if ref is None else ref
    grid = (B * T, column_shares(B * T, V, 4 * launch["LANES"] * vec))
    with on_device(logits):
        _row_reductions_bwd_kernel[grid](
            logits, other, row_of, labels, lse, lse if ref is None else ref_lse, coefs, out,
            T, *logits.stride()[:2], *other.stride()[:2], *out.stride()[:2], V, *backward_map(a, c),
            SOFTCAP=softcap_kind(c), HAS_REF=ref is not None,
            ALIGNED=lies_alike(logits, out, vec), REF_ALIGNED=lies_alike(other, out, vec), **launch,
        )  # fmt: skip
