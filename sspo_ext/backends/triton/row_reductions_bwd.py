"""Row backward for gradients at the log-prob, entropy, sum of squares and KL together: one read, one write.

Rows are walked as in token_logp_bwd.py, by the gradient's 16-byte boundaries.
"""

import torch
import triton
import triton.language as tl

from .row_reductions_fwd import _LEAST_EXPONENT, lies_alike
from .rows import (
    LN2,
    LOG2E,
    edge_columns,
    head_length,
    jit,
    load_tiles,
    on_device,
    row_launch,
    row_offset,
    store_tiles,
    tanh_sech2,
    two_floats,
)
from .token_logp_bwd import _column_shares, row_shift


@triton.jit
def _grad(
    x, y, a, scale, shift, ref_shift, power, constant, log_p, square, kappa,
    SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """p (constant + log_p t + square p) - kappa q, times the softcap's share of dz/dx; p = power * 2^t."""
    if SOFTCAP:
        u, sech2 = tanh_sech2(a * x, VEC > 4)
    else:
        u = x
    t = tl.fma(u, scale, shift)
    p = tl.exp2(t) * power
    d = p * tl.fma(square, p, tl.fma(log_p, tl.maximum(t, _LEAST_EXPONENT), constant))
    if HAS_REF:
        if SOFTCAP:
            y, _ = tanh_sech2(a * y, VEC > 4)
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
    if MASKED:  # rows far from 0 are nothing but masked passes
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


@jit
def _row_reductions_bwd_kernel(
    logits_ptr,  # (B, T, V)
    ref_logits_ptr,  # (B, T, V) or not read
    row_of_ptr,  # (B * T,) int32
    labels_ptr,  # (N,) int64; outside [0, V): no label
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
    ALIGNED: tl.constexpr,  # every row of the logits lies in its 16 bytes as its gradient does
    REF_ALIGNED: tl.constexpr,  # and that of the reference
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    # this program's share of the row: groups [g_begin, g_end), and the edges if it is the last
    out_row_ptr = out_ptr + row_offset(i, T, stride_ob, stride_ot)
    head = head_length(out_row_ptr, VEC)
    groups = tl.maximum(V - head, 0) // VEC
    out_body_ptr = tl.multiple_of(out_row_ptr + head, 16)
    STEP: tl.constexpr = 4 * LANES
    share = tl.cdiv(tl.cdiv(groups, STEP), tl.num_programs(1)) * STEP
    g_begin = tl.program_id(1) * share
    g_end = tl.minimum(g_begin + share, groups)
    g_loop_end = tl.maximum(g_begin + (g_end - g_begin) // STEP * STEP, g_begin)
    columns, at_edge = edge_columns(head, groups, V, VEC)
    has_edges = tl.program_id(1) == tl.num_programs(1) - 1
    at_edge = at_edge & (columns < tl.where(has_edges, V, 0))

    n = tl.load(row_of_ptr + i)
    scored = n >= 0
    coefs_ptr += n.to(tl.int64) * 5
    g_label = tl.load(coefs_ptr, mask=scored, other=0.0)
    log_p = tl.load(coefs_ptr + 2, mask=scored, other=0.0)
    square = tl.load(coefs_ptr + 3, mask=scored, other=0.0)
    kappa = tl.zeros([], tl.float32)
    if HAS_REF:
        kappa = tl.load(coefs_ptr + 4, mask=scored, other=0.0)
    if (g_label == 0.0) & (log_p == 0.0) & (square == 0.0) & (kappa == 0.0):
        zero = tl.zeros([LANES, VEC], tl.float32)
        for g in range(g_begin, g_loop_end, STEP):
            store_tiles(out_body_ptr + g * VEC, zero, zero, zero, zero, 0, False, LANES, VEC)
        if g_loop_end < g_end:
            store_tiles(out_body_ptr + g_loop_end * VEC, zero, zero, zero, zero, g_end - g_loop_end, True, LANES, VEC)
        tl.store(out_row_ptr + columns, tl.zeros([2 * VEC], tl.float32).to(out_ptr.dtype.element_ty), mask=at_edge)
    else:
        row_ptr = logits_ptr + row_offset(i, T, stride_lb, stride_lt)
        ref_row_ptr = ref_logits_ptr + row_offset(i, T, stride_rb, stride_rt)
        body_ptr = row_ptr + head
        if ALIGNED:
            body_ptr = tl.multiple_of(body_ptr, 16)
        ref_body_ptr = ref_row_ptr + head
        if REF_ALIGNED:
            ref_body_ptr = tl.multiple_of(ref_body_ptr, 16)
        label = tl.load(labels_ptr + n)
        shift, lost, centre = row_shift(tl.load(lse_ptr + n), scale, per_lse, per_lse_lost, SOFTCAP)
        power = tl.exp2(lost)
        # log p = ln 2 (t + lost)
        constant = slope * (tl.load(coefs_ptr + 1) - g_label + log_p * lost * LN2)
        log_p = slope * (log_p * LN2)
        square = slope * square
        ref_shift = shift
        ref_centre = centre
        if HAS_REF:
            ref_lse = tl.load(ref_lse_ptr + n)
            ref_shift, ref_lost, ref_centre = row_shift(ref_lse, scale, per_lse, per_lse_lost, SOFTCAP)
            kappa = slope * kappa * tl.exp2(ref_lost)
        g_loop_end = tl.where((centre == 0.0) & (ref_centre == 0.0), g_loop_end, g_begin)

        # In place, these must be read before anything is written, and the label's gradient is written last.
        group = (label - head) // VEC  # of the label; negative or past the end at the edges
        in_head_or_tail = (label < head) | (group >= groups)
        mine = tl.where(in_head_or_tail, has_edges, (group >= g_begin) & (group < g_end))
        mine = mine & (label >= 0) & (label < V)
        x_label = tl.load(row_ptr + label, mask=mine, other=0.0).to(tl.float32)
        x_edge = tl.load(row_ptr + columns, mask=at_edge, other=0.0).to(tl.float32)
        y_label = x_label
        y_edge = x_edge
        if HAS_REF:
            y_label = tl.load(ref_row_ptr + label, mask=mine, other=0.0).to(tl.float32)
            y_edge = tl.load(ref_row_ptr + columns, mask=at_edge, other=0.0).to(tl.float32)
        x_label -= centre
        x_edge -= centre
        y_label -= ref_centre
        y_edge -= ref_centre
        tl.debug_barrier()
        for g in range(g_begin, g_loop_end, STEP):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, ref_body_ptr + g * VEC, 0,
                a, scale, shift, ref_shift, centre, ref_centre, power, constant, log_p, square, kappa,
                False, SOFTCAP, HAS_REF, ALIGNED, REF_ALIGNED, LANES, VEC,
            )  # fmt: skip
        for g in range(g_loop_end, g_end, STEP):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, ref_body_ptr + g * VEC, g_end - g,
                a, scale, shift, ref_shift, centre, ref_centre, power, constant, log_p, square, kappa,
                True, SOFTCAP, HAS_REF, ALIGNED, REF_ALIGNED, LANES, VEC,
            )  # fmt: skip
        d_edge = _grad(
            x_edge, y_edge, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC
        )
        tl.store(out_row_ptr + columns, d_edge.to(out_ptr.dtype.element_ty), mask=at_edge)
        tl.debug_barrier()
        weight = slope * g_label
        if SOFTCAP:
            _, sech2 = tanh_sech2(a * x_label, VEC > 4)
            weight = weight * sech2
        d_label = weight + _grad(
            x_label, y_label, a, scale, shift, ref_shift, power, constant, log_p, square, kappa, SOFTCAP, HAS_REF, VEC
        )
        tl.store(out_row_ptr + label, d_label.to(out_ptr.dtype.element_ty), mask=mine)


def row_reductions_bwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous
    row_of: torch.Tensor,  # (B * T,) int32: row n of the position, or -1
    labels: torch.Tensor,  # (N,) int64; a label outside [0, V) gets no onehot
    lse: torch.Tensor,  # (N,) float64
    ref: torch.Tensor | None,
    ref_lse: torch.Tensor,  # (N,) float64; not read without a reference
    coefs: torch.Tensor,  # (N, 5) float32: g, constant, log_p, square, kappa
    a: float,
    c: float,
    out: torch.Tensor,  # (B, T, V) like logits, or the logits themselves
) -> None:
    """out[i, v] = (g (onehot - p)[v] + p[v] (constant + log_p log p[v] + square p[v]) - kappa q[v]) * dz/dx, p and q
    the softmax of logits and reference; zeros where nothing is scored or all but `constant` is 0.
    """
    assert a > 0 and c >= 0, (a, c)
    assert out.dtype == logits.dtype and out.shape == logits.shape and out.stride(-1) == 1
    B, T, V = logits.shape
    if B * T * V == 0:
        return
    launch = row_launch(V, logits.dtype)
    vec, other = launch["VEC"], logits if ref is None else ref
    grid = (B * T, _column_shares(B * T, V, 4 * launch["LANES"] * vec))
    factor = c if c else a
    scale, _ = two_floats(factor * LOG2E.value)
    with on_device(logits):
        _row_reductions_bwd_kernel[grid](
            logits, other, row_of, labels, lse, lse if ref is None else ref_lse, coefs, out,
            T, *logits.stride()[:2], *other.stride()[:2], *out.stride()[:2], V,
            a, a * c if c else a, scale, *two_floats(scale / factor),
            SOFTCAP=c != 0, HAS_REF=ref is not None,
            ALIGNED=lies_alike(logits, out, vec), REF_ALIGNED=lies_alike(other, out, vec), **launch,
        )  # fmt: skip
