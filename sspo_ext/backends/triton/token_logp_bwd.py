"""Row backward: the gradient of every position's logits, written once; the rows that matter are read once, the others
not at all.

Rows are walked as in token_logp_fwd.py, by the boundaries of the *gradient's* row: where the logits' row lies differently in
its 16 bytes (a slice of a larger tensor with an odd V), its loads are narrow and the stores are still wide.
"""

import torch
import triton
import triton.language as tl

from .rows import (
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

# From here on a float32 exponent has no digits behind its point.
_FAR = tl.constexpr(2.0**24)
# A float64 lse holds log V up to here, and what two floats make of a factor is exact enough.
_FARTHEST = tl.constexpr(2.0**46)


@triton.jit
def row_shift(lse, scale, per_lse, per_lse_lost, SOFTCAP: tl.constexpr):
    """(shift, lost, centre): softmax = 2^(scale * (u - centre) + shift + lost), `lost` being what float32 cut off.

    The centre is 0 but where logits are so large that scale * u has no digits left; it is their maximum then.
    """
    exact = -(lse * per_lse + lse * per_lse_lost)
    centre = tl.zeros([], tl.float32)
    if not SOFTCAP:
        far = (tl.abs(exact) > _FAR) & (tl.abs(lse) < float("inf"))
        centre = tl.where(far, (exact / -scale).to(tl.float32), 0.0)
        exact = tl.where(far & (tl.abs(exact) > _FARTHEST), 0.0, exact + centre.to(tl.float64) * scale)
    shift = exact.to(tl.float32)
    lost = (exact - shift.to(tl.float64)).to(tl.float32)
    return shift, tl.where(tl.abs(lost) < 1.0, lost, 0.0), centre


@triton.jit
def _grad(x, a, scale, shift, weight, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """weight * softmax(z) * dz/dx, what is constant in the row being in `weight`."""
    if SOFTCAP:
        u, sech2 = tanh_sech2(a * x, VEC > 4)
        return tl.exp2(tl.fma(u, scale, shift)) * (weight * sech2)
    else:
        return tl.exp2(tl.fma(x, scale, shift)) * weight


@triton.jit
def _write_tiles(
    out_ptr, logits_ptr, lanes, a, scale, shift, centre, weight,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    x0, x1, x2, x3 = load_tiles(logits_ptr, lanes, MASKED, ALIGNED, LANES, VEC)
    if MASKED:  # rows far from 0 are nothing but masked passes
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
    labels_ptr,  # (N,) int64; -1: no label in this vocabulary; others outside [0, V): NaN
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
    ALIGNED: tl.constexpr,  # every row of the logits lies in its 16 bytes as its gradient does
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
    coef = tl.load(coef_ptr + n, mask=n >= 0, other=0.0).to(tl.float32)
    if HAS_UPSTREAM:
        coef = tl.where(coef == 0.0, 0.0, coef * tl.load(upstream_ptr).to(tl.float32))
    if coef == 0.0:
        zero = tl.zeros([LANES, VEC], tl.float32)
        for g in range(g_begin, g_loop_end, STEP):
            store_tiles(out_body_ptr + g * VEC, zero, zero, zero, zero, 0, False, LANES, VEC)
        if g_loop_end < g_end:
            store_tiles(out_body_ptr + g_loop_end * VEC, zero, zero, zero, zero, g_end - g_loop_end, True, LANES, VEC)
        tl.store(out_row_ptr + columns, tl.zeros([2 * VEC], tl.float32).to(out_ptr.dtype.element_ty), mask=at_edge)
    else:
        row_ptr = logits_ptr + row_offset(i, T, stride_lb, stride_lt)
        body_ptr = row_ptr + head
        if ALIGNED:
            body_ptr = tl.multiple_of(body_ptr, 16)
        label = tl.load(labels_ptr + n)
        lse = tl.load(lse_ptr + n)
        # In float32 a large shift loses more than its exponential may: what is cut off it goes into the row's factor.
        shift, lost, centre = row_shift(lse, scale, per_lse, per_lse_lost, SOFTCAP)
        g_loop_end = tl.where(centre == 0.0, g_loop_end, g_begin)
        weight = tl.where((label >= -1) & (label < V), coef * slope, float("nan"))
        softmax_weight = -weight * tl.exp2(lost)

        # In place, these must be read before anything is written, and the label's gradient is written last.
        group = (label - head) // VEC  # of the label; negative or past the end at the edges
        in_head_or_tail = (label < head) | (group >= groups)
        mine = tl.where(in_head_or_tail, has_edges, (group >= g_begin) & (group < g_end))
        mine = mine & (label >= 0) & (label < V)
        x_label = tl.load(row_ptr + label, mask=mine, other=0.0).to(tl.float32) - centre
        x_edge = tl.load(row_ptr + columns, mask=at_edge, other=0.0).to(tl.float32) - centre
        tl.debug_barrier()
        for g in range(g_begin, g_loop_end, STEP):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, 0, a, scale, shift, centre, softmax_weight,
                False, SOFTCAP, ALIGNED, LANES, VEC,
            )  # fmt: skip
        for g in range(g_loop_end, g_end, STEP):
            _write_tiles(
                out_body_ptr + g * VEC, body_ptr + g * VEC, g_end - g, a, scale, shift, centre, softmax_weight,
                True, SOFTCAP, ALIGNED, LANES, VEC,
            )  # fmt: skip
        d_edge = _grad(x_edge, a, scale, shift, softmax_weight, SOFTCAP, VEC)
        tl.store(out_row_ptr + columns, d_edge.to(out_ptr.dtype.element_ty), mask=at_edge)
        tl.debug_barrier()
        if SOFTCAP:
            _, sech2 = tanh_sech2(a * x_label, VEC > 4)
            weight = weight * sech2
        d_label = weight + _grad(x_label, a, scale, shift, softmax_weight, SOFTCAP, VEC)
        tl.store(out_row_ptr + label, d_label.to(out_ptr.dtype.element_ty), mask=mine)


def _column_shares(positions: int, V: int, step: int) -> int:
    """Programs per row: enough for ten on each of some 130 multiprocessors where there are few rows, none with less
    than one full pass.
    """
    return max(1, min(triton.cdiv(1320, positions), V // step))


def token_logp_bwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous
    row_of: torch.Tensor,  # (B * T,) int32: row n of the position, or -1
    labels: torch.Tensor,  # (N,) int64; -1 gets no onehot, others outside [0, V) a row of NaN
    lse: torch.Tensor,  # (N,) float64
    coef: torch.Tensor,  # (N,) float32: dL/dlogp
    upstream: torch.Tensor | None,  # () multiplies coef
    a: float,
    c: float,
    out: torch.Tensor,  # (B, T, V) like logits, or the logits themselves
) -> None:
    """out[i, v] = upstream * coef * (1[v = label] - softmax(z)[v]) * dz/dx; zeros where nothing is scored or coef is
    0.
    """
    assert a > 0 and c >= 0, (a, c)
    assert out.dtype == logits.dtype and out.shape == logits.shape and out.stride(-1) == 1
    B, T, V = logits.shape
    if B * T * V == 0:
        return
    launch = row_launch(V, logits.dtype)
    vec = launch["VEC"]
    same_place = (logits.data_ptr() - out.data_ptr()) % 16 == 0
    same_strides = all((logits.stride(d) - out.stride(d)) % vec == 0 or logits.shape[d] == 1 for d in (0, 1))
    grid = (B * T, _column_shares(B * T, V, 4 * launch["LANES"] * vec))
    factor = c if c else a
    scale, _ = two_floats(factor * LOG2E.value)
    with on_device(logits):
        _token_logp_bwd_kernel[grid](
            logits, row_of, labels, lse, coef, coef if upstream is None else upstream, out,
            T, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), V,
            a, a * c if c else a, scale, *two_floats(scale / factor),
            HAS_UPSTREAM=upstream is not None, SOFTCAP=c != 0, ALIGNED=same_place and same_strides, **launch,
        )  # fmt: skip
