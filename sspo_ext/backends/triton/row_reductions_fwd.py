# SPDX-License-Identifier: Apache-2.0
"""Row forward with entropy, sum of squares and KL from a reference, in one read of the row (and of the reference's).

There is one program a row. Rows are walked by the 16-byte boundaries of the logits, as in token_logp_fwd.py.

Let t be a logit's exponent of 2 relative to the lane's maximum, and e = 2^t. A lane sums e, e t and e^2. Let r and s be
the same of the reference. A lane then also sums s and s (r - t). When a lane meets a new maximum, what it has summed is
made relative to that.
"""

import torch
import triton
import triton.language as tl

from .rows import (
    LN2,
    LOWEST,
    aligned_part,
    edge_columns,
    forward_map,
    jit,
    lies_alike,
    log_prob,
    mapped,
    mapped_edges,
    mapped_label,
    mapped_tiles,
    max_of_row,
    on_device,
    row_launch,
    row_lse,
    row_offset,
    softcap_kind,
)

# Lower than any exponent whose power is not 0. Exponents are kept above it, so that 0 * t is 0 where t is -inf.
LEAST_EXPONENT = tl.constexpr(-160.0)


@triton.jit
def _moved(m, top, e, et, ee, srt, s, scale):
    """Sums relative to the maximum m, made relative to top."""
    d = top * scale - m * scale
    f = tl.exp2(-d)
    return f * e, f * (et - d * e), f * f * ee, srt + d * s


@triton.jit
def _moved_reference(m, top, s, srt, scale):
    """The reference's sums relative to its maximum m, made relative to top."""
    d = top * scale - m * scale
    f = tl.exp2(-d)
    # srt is infinite where the row forbids what the reference allows, as far as this lane knows; f may be 0
    return f * s, tl.where(srt == float("inf"), srt, f * (srt - d * s))


@triton.jit
def _et(t, e, total):
    """Total + e t, where 0 times -inf is 0."""
    return tl.fma(e, tl.maximum(t, LEAST_EXPONENT), total)


@triton.jit
def _srt(y, shift, scale, t):
    """(s, s (r - t)), both 0 where the reference has no probability."""
    r = tl.fma(y, scale, shift)
    s = tl.exp2(r)
    return s, tl.where(s == 0.0, 0.0, s * (r - t))


@triton.jit
def _accumulate(
    m, e, et, ee, m_ref, s, srt, ptr, ref_ptr, lanes, a, scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, REF_ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One pass: adds four tiles to each lane's maxima and sums, all (LANES,)."""
    x0, x1, x2, x3, top = mapped_tiles(ptr, lanes, a, MASKED, SOFTCAP, True, LANES, VEC)
    top = tl.maximum(m, top)
    e, et, ee, srt = _moved(m, top, e, et, ee, srt, s, scale)
    shift = -(top * scale)[:, None]
    t0 = tl.fma(x0, scale, shift)
    t1 = tl.fma(x1, scale, shift)
    t2 = tl.fma(x2, scale, shift)
    t3 = tl.fma(x3, scale, shift)
    e0 = tl.exp2(t0)
    e1 = tl.exp2(t1)
    e2 = tl.exp2(t2)
    e3 = tl.exp2(t3)
    e += tl.sum((e0 + e1) + (e2 + e3), axis=1)
    zero = tl.zeros([LANES, VEC], tl.float32)
    et += tl.sum(_et(t0, e0, _et(t1, e1, _et(t2, e2, _et(t3, e3, zero)))), axis=1)
    ee += tl.sum(tl.fma(e0, e0, tl.fma(e1, e1, tl.fma(e2, e2, e3 * e3))), axis=1)
    if HAS_REF:
        y0, y1, y2, y3, top_ref = mapped_tiles(ref_ptr, lanes, a, MASKED, SOFTCAP, REF_ALIGNED, LANES, VEC)
        top_ref = tl.maximum(m_ref, top_ref)
        s, srt = _moved_reference(m_ref, top_ref, s, srt, scale)
        shift = -(top_ref * scale)[:, None]
        s0, q0 = _srt(y0, shift, scale, t0)
        s1, q1 = _srt(y1, shift, scale, t1)
        s2, q2 = _srt(y2, shift, scale, t2)
        s3, q3 = _srt(y3, shift, scale, t3)
        s += tl.sum((s0 + s1) + (s2 + s3), axis=1)
        srt += tl.sum((q0 + q1) + (q2 + q3), axis=1)
        m_ref = top_ref
    return top, e, et, ee, m_ref, s, srt


@triton.jit
def _over_lanes(m, e, et, ee, m_ref, s, srt, scale):
    """Maxima and sums of the lanes (LANES,) into one of each."""
    top = tl.max(m, axis=0)
    e, et, ee, srt = _moved(m, top, e, et, ee, srt, s, scale)
    top_ref = tl.max(m_ref, axis=0)
    s, srt = _moved_reference(m_ref, top_ref, s, srt, scale)
    return (
        top, tl.sum(e, axis=0), tl.sum(et, axis=0), tl.sum(ee, axis=0), top_ref, tl.sum(s, axis=0), tl.sum(srt, axis=0),
    )  # fmt: skip


@triton.jit
def _over_groups(
    body_ptr, ref_body_ptr, groups, a, scale,
    SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, REF_ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of the row without its edges."""
    m = tl.full([LANES], LOWEST, tl.float32)
    m_ref = tl.full([LANES], LOWEST, tl.float32)
    e = tl.zeros([LANES], tl.float32)
    et = tl.zeros([LANES], tl.float32)
    ee = tl.zeros([LANES], tl.float32)
    s = tl.zeros([LANES], tl.float32)
    srt = tl.zeros([LANES], tl.float32)
    in_loop = groups // (4 * LANES) * (4 * LANES)
    for g in range(0, in_loop, 4 * LANES):
        m, e, et, ee, m_ref, s, srt = _accumulate(
            m, e, et, ee, m_ref, s, srt, body_ptr + g * VEC, ref_body_ptr + g * VEC, 0, a, scale,
            False, SOFTCAP, HAS_REF, REF_ALIGNED, LANES, VEC,
        )  # fmt: skip
    if in_loop < groups:
        m, e, et, ee, m_ref, s, srt = _accumulate(
            m, e, et, ee, m_ref, s, srt, body_ptr + in_loop * VEC, ref_body_ptr + in_loop * VEC, groups - in_loop,
            a, scale, True, SOFTCAP, HAS_REF, REF_ALIGNED, LANES, VEC,
        )  # fmt: skip
    return _over_lanes(m, e, et, ee, m_ref, s, srt, scale)


@triton.jit
def _with_edges(
    top, e, et, ee, top_ref, s, srt, row_ptr, ref_row_ptr, lead, groups, V, a, scale,
    SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Adds the row's edges to the maxima and sums of its groups, all relative to the whole row's maxima."""
    columns, at_edge = edge_columns(lead, groups, V, VEC)
    u = mapped_edges(row_ptr, columns, at_edge, a, SOFTCAP, VEC)
    top_all = tl.maximum(top, tl.max(u, axis=0))
    e, et, ee, srt = _moved(top, top_all, e, et, ee, srt, s, scale)
    t = tl.fma(u, scale, -(top_all * scale))
    power = tl.exp2(t)
    e += tl.sum(power, axis=0)
    et += tl.sum(_et(t, power, 0.0), axis=0)
    ee += tl.sum(power * power, axis=0)
    if HAS_REF:
        y = mapped_edges(ref_row_ptr, columns, at_edge, a, SOFTCAP, VEC)
        top_ref_all = tl.maximum(top_ref, tl.max(y, axis=0))
        s, srt = _moved_reference(top_ref, top_ref_all, s, srt, scale)
        top_ref = top_ref_all
        power, product = _srt(y, -(top_ref * scale), scale, t)
        s += tl.sum(power, axis=0)
        srt += tl.sum(product, axis=0)
    return top_all, e, et, ee, top_ref, s, srt


@triton.jit
def _in_two_passes(
    row_ptr, ref_ptr, V, a, scale, SOFTCAP: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr
):
    """Maxima and sums, the maxima first.

    For rows so large that scale * x overflows or its rounding matters, rows that
    lie below LOWEST altogether, and rows that forbid what the reference may allow.
    """
    o = tl.arange(0, BLOCK)
    top = max_of_row(row_ptr, V, a, SOFTCAP, BLOCK, VEC)
    top_ref = top
    if HAS_REF:
        top_ref = max_of_row(ref_ptr, V, a, SOFTCAP, BLOCK, VEC)
    e = tl.zeros([BLOCK], tl.float32)
    et = tl.zeros([BLOCK], tl.float32)
    ee = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    srt = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        inside = o < V - v
        x = tl.load(row_ptr + v + o, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.where(inside, (mapped(x, a, SOFTCAP, VEC) - top) * scale, float("-inf"))
        power = tl.exp2(t)
        e += power
        et = _et(t, power, et)
        ee = tl.fma(power, power, ee)
        if HAS_REF:
            y = tl.load(ref_ptr + v + o, mask=inside, other=float("-inf")).to(tl.float32)
            r = tl.where(inside, (mapped(y, a, SOFTCAP, VEC) - top_ref) * scale, float("-inf"))
            power = tl.exp2(r)
            s += power
            srt += tl.where(power == 0.0, 0.0, power * (r - t))
    return (
        top, tl.sum(e, axis=0), tl.sum(et, axis=0), tl.sum(ee, axis=0), top_ref, tl.sum(s, axis=0), tl.sum(srt, axis=0),
    )  # fmt: skip


@triton.jit
def _not_negative(x):
    """0 for what rounding made negative; NaN stays."""
    return tl.where(x < 0, 0.0, x)


@jit
def _row_reductions_fwd_kernel(
    logits_ptr,  # (B, T, V)
    ref_logits_ptr,  # (B, T, V) or not read
    rows_ptr,  # (N,) int64
    labels_ptr,  # (N,) int64; -1: in another shard; others outside [0, V): NaN
    logp_ptr,  # (N,) float32
    lse_ptr,  # (N,) float64
    entropy_ptr,  # (N,) float32
    sum_p2_ptr,
    kl_ptr,
    ref_lse_ptr,  # (N,) float64
    T: tl.int64,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_rb: tl.int64,
    stride_rt: tl.int64,
    V: tl.int32,
    a: tl.float32,  # with SOFTCAP, u = tanh(a * x); else u = x and a is not used
    factor: tl.float32,  # z = factor * u
    factor_lost: tl.float32,  # what float32 cuts off it
    scale: tl.float32,  # factor / ln 2
    SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    REF_ALIGNED: tl.constexpr,  # every row of the reference has its 16-byte boundaries where the logits have
    LANES: tl.constexpr,
    VEC: tl.constexpr,  # elements in 16 bytes
):
    n = tl.program_id(0)
    position = tl.load(rows_ptr + n)
    row_ptr = logits_ptr + row_offset(position, T, stride_b, stride_t)
    ref_row_ptr = ref_logits_ptr + row_offset(position, T, stride_rb, stride_rt)
    lead, groups = aligned_part(row_ptr, V, VEC)
    body_ptr = tl.multiple_of(row_ptr + lead, 16)
    ref_body_ptr = ref_row_ptr + lead
    if REF_ALIGNED:
        ref_body_ptr = tl.multiple_of(ref_body_ptr, 16)
    label = tl.load(labels_ptr + n)
    u_label = mapped_label(row_ptr, label, V, a, SOFTCAP, VEC)

    top, total, total_et, total_ee, top_ref, total_s, total_srt = _over_groups(
        body_ptr, ref_body_ptr, groups, a, scale, SOFTCAP, HAS_REF, REF_ALIGNED, LANES, VEC
    )
    top, total, total_et, total_ee, top_ref, total_s, total_srt = _with_edges(
        top, total, total_et, total_ee, top_ref, total_s, total_srt, row_ptr, ref_row_ptr, lead, groups, V, a, scale,
        SOFTCAP, HAS_REF, VEC,
    )  # fmt: skip
    ordinary = (total > 0.0) & (total < float("inf"))
    if HAS_REF:
        ordinary = ordinary & (total_s > 0.0) & (total_s < float("inf")) & (total_srt < float("inf"))
    # the sums are relative to the rounded top * scale
    rounding = tl.fma(top, scale, -(top * scale))
    rounding_ref = tl.fma(top_ref, scale, -(top_ref * scale))
    if not ordinary:
        top, total, total_et, total_ee, top_ref, total_s, total_srt = _in_two_passes(
            row_ptr, ref_row_ptr, V, a, scale, SOFTCAP, HAS_REF, 4 * LANES, VEC
        )
        rounding = 0.0
        rounding_ref = 0.0
    log_sum = tl.log(total)
    log_total = log_sum - rounding * LN2
    lse = row_lse(top, log_total, factor, factor_lost)
    tl.store(lse_ptr + n, lse)
    tl.store(entropy_ptr + n, _not_negative(log_sum - (total_et / total) * LN2))
    tl.store(sum_p2_ptr + n, total_ee / total / total)
    if HAS_REF:
        log_sum_ref = tl.log(total_s)
        tl.store(ref_lse_ptr + n, row_lse(top_ref, log_sum_ref - rounding_ref * LN2, factor, factor_lost))
        tl.store(kl_ptr + n, _not_negative((total_srt / total_s) * LN2 + (log_sum - log_sum_ref)))
    tl.store(logp_ptr + n, log_prob(u_label, label, top, log_total, lse, factor, factor_lost))


def row_reductions_fwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous, any strides before it
    rows: torch.Tensor,  # (N,) int64: position b * T + t
    labels: torch.Tensor,  # (N,) int64
    ref: torch.Tensor | None,  # the reference's logits: dtype, shape and map of the logits
    a: float,
    c: float,
    wants_entropy: bool = True,
    wants_sum_p2: bool = True,
) -> tuple[torch.Tensor, ...]:
    """logp, lse as `token_logp_fwd`, entropy, sum of p^2, KL(ref || p), and the reference's lse.

    The log-sum-exps are (N,) float64, the rest (N,) float32. What is not asked for is empty, as the last two are
    without a reference. It is computed all the same: a row waits for memory, not for arithmetic.
    """
    assert ref is None or (ref.shape == logits.shape and ref.dtype == logits.dtype)
    N, (_, T, V) = rows.shape[0], logits.shape
    M = 0 if ref is None else N
    logp, entropy, sum_p2, kl = (torch.empty(n, dtype=torch.float32, device=logits.device) for n in (N, N, N, M))
    lse, ref_lse = (torch.empty(n, dtype=torch.float64, device=logits.device) for n in (N, M))
    out = (logp, lse, entropy, sum_p2, kl, ref_lse)
    if N == 0:
        return out
    launch, other = row_launch(V, logits.dtype), logits if ref is None else ref
    with on_device(logits):
        _row_reductions_fwd_kernel[(N,)](
            logits, other, rows, labels, *out,
            T, *logits.stride()[:2], *other.stride()[:2], V, *forward_map(a, c),
            SOFTCAP=softcap_kind(c), HAS_REF=ref is not None,
            REF_ALIGNED=lies_alike(logits, other, launch["VEC"]), **launch,
        )  # fmt: skip
    return (logp, lse, entropy if wants_entropy else entropy[:0], sum_p2 if wants_sum_p2 else sum_p2[:0], kl, ref_lse)
