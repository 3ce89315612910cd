"""Row forward: the log-probability of one label per row, and the row's log-sum-exp, in one read of the row.

A row is walked as [head | groups of 16 bytes | tail]: the groups start at the row's first 16-byte boundary, so the
loop moves 16 bytes per lane whatever V and the row's address are. Head and tail, under 16 bytes each, are one masked
access of their own.
"""

import torch
import triton
import triton.language as tl

from .rows import (
    LN2,
    LOG2E,
    arrival_counters,
    edge_columns,
    head_length,
    jit,
    load_tiles,
    on_device,
    row_launch,
    row_offset,
    tanh_sech2,
    two_floats,
)

# Running maxima start here and not at -inf: a lane that has met only -inf (masked vocabulary) then has weights
# exp2(-inf) = 0 instead of NaN. Scaled, it must stay finite. Rows that lie below it altogether are summed again,
# relative to their own maximum.
_LOWEST = tl.constexpr(-1e30)

# Passes of the loop between two reductions over the block. The reductions cut a row into segments that several programs
# can share, with the same bits however many they are; four passes are 64 elements a thread, enough to hide a reduction.
_PASSES = tl.constexpr(4)


@triton.jit
def _mapped(x, a, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    if SOFTCAP:
        x, _ = tanh_sech2(a * x, VEC > 4)
    return x


@triton.jit
def _accumulate(
    m, s, ptr, lanes, a, scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """Four tiles (LANES, VEC) into each lane's maximum m (LANES,) and sums s (LANES, VEC) of exp2(scale * (x - m)).

    One maximum for 4 * VEC elements makes rescaling cheap. It is the lane's own: threads do not talk to each other in
    the loop.
    """
    x0, x1, x2, x3 = load_tiles(ptr, lanes, MASKED, True, LANES, VEC)
    if SOFTCAP:
        x0 = _mapped(x0, a, SOFTCAP, VEC)
        x1 = _mapped(x1, a, SOFTCAP, VEC)
        x2 = _mapped(x2, a, SOFTCAP, VEC)
        x3 = _mapped(x3, a, SOFTCAP, VEC)
        if MASKED:  # tanh(-inf) is -1, a value like any other
            lane = tl.arange(0, LANES)[:, None]
            x0 = tl.where(lane < lanes, x0, float("-inf"))
            x1 = tl.where(lane < lanes - LANES, x1, float("-inf"))
            x2 = tl.where(lane < lanes - 2 * LANES, x2, float("-inf"))
            x3 = tl.where(lane < lanes - 3 * LANES, x3, float("-inf"))
    m_new = tl.maximum(m, tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=1))
    top = m_new * scale
    rescale = tl.exp2(m * scale - top)[:, None]
    shift = -top[:, None]
    p = tl.exp2(tl.fma(x0, scale, shift)) + tl.exp2(tl.fma(x1, scale, shift))
    q = tl.exp2(tl.fma(x2, scale, shift)) + tl.exp2(tl.fma(x3, scale, shift))
    return m_new, tl.fma(s, rescale, p + q)


@triton.jit
def _segment(body_ptr, begin, end, a, scale, SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(max, sum of exp2(scale * (u - max))) over 16-byte groups [begin, end) of a row."""
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.zeros([LANES, VEC], tl.float32)
    in_loop = begin + (end - begin) // (4 * LANES) * (4 * LANES)
    for g in range(begin, in_loop, 4 * LANES):
        m, s = _accumulate(m, s, body_ptr + g * VEC, 0, a, scale, False, SOFTCAP, LANES, VEC)
    if in_loop < end:
        m, s = _accumulate(m, s, body_ptr + in_loop * VEC, end - in_loop, a, scale, True, SOFTCAP, LANES, VEC)
    top = tl.max(m, axis=0)
    return top, tl.sum(tl.sum(s, axis=1) * tl.exp2(m * scale - top * scale), axis=0)


@triton.jit
def _merge(m, total, m_new, total_new, scale):
    """Two (max, sum) into one."""
    top = tl.maximum(m, m_new)
    return top, total * tl.exp2(m * scale - top * scale) + total_new * tl.exp2(m_new * scale - top * scale)


@triton.jit
def _max_and_sum_in_two_passes(row_ptr, V, a, scale, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(max, sum of exp2(scale * (x - max))): for rows so large that scale * x overflows or its rounding counts, or all
    below _LOWEST."""
    o = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(row_ptr + v + o, mask=o < V - v, other=float("-inf")).to(tl.float32)
        m = tl.maximum(m, tl.where(o < V - v, _mapped(x, a, SOFTCAP, VEC), float("-inf")))
    top = tl.max(m, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)  # nothing is allowed: a sum of 0, lse -inf
    s = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(row_ptr + v + o, mask=o < V - v, other=float("-inf")).to(tl.float32)
        s += tl.where(o < V - v, tl.exp2((_mapped(x, a, SOFTCAP, VEC) - top) * scale), 0.0)
    return top, tl.sum(s, axis=0)


@triton.jit
def _sum_and_rounding(x, y):
    """(x + y rounded, what the rounding lost)."""
    total = x + y
    y_part = total - x
    return total, (x - (total - y_part)) + (y - y_part)


@jit
def _token_logp_fwd_kernel(
    logits_ptr,  # (B, T, V)
    rows_ptr,  # (N,) int64
    labels_ptr,  # (N,) int64; -1 is a label that is not in this vocabulary (another shard's)
    logp_ptr,  # (N,) float32
    lse_ptr,  # (N,) float64
    partial_ptr,  # (N, most_segments, 2) float32: max and sum of each segment; not used by one program a row
    arrived_ptr,  # (N,) int32, zeros before and after; not used by one program a row
    T: tl.int64,
    stride_b: tl.int64,
    stride_t: tl.int64,
    V: tl.int32,
    most_segments: tl.int32,
    a: tl.float32,  # with SOFTCAP, u = tanh(a * x); else u = x and a is not used
    factor: tl.float32,  # z = factor * u
    factor_lost: tl.float32,  # what float32 cuts off it
    scale: tl.float32,  # factor / ln 2
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,  # elements in 16 bytes
):
    n = tl.program_id(0)
    programs = tl.num_programs(1)  # of this row
    row_ptr = logits_ptr + row_offset(tl.load(rows_ptr + n), T, stride_b, stride_t)
    head = head_length(row_ptr, VEC)
    groups = tl.maximum(V - head, 0) // VEC
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    # the latency of these passes behind the loop
    label = tl.load(labels_ptr + n)
    in_vocabulary = (label >= 0) & (label < V)
    u_label = _mapped(tl.load(row_ptr + label, mask=in_vocabulary, other=float("nan")).to(tl.float32), a, SOFTCAP, VEC)
    columns, at_edge = edge_columns(head, groups, V, VEC)
    x = tl.load(row_ptr + columns, mask=at_edge, other=float("-inf")).to(tl.float32)
    u_edge = tl.where(at_edge, _mapped(x, a, SOFTCAP, VEC), float("-inf"))

    SEGMENT: tl.constexpr = 4 * LANES * _PASSES
    segments = tl.cdiv(groups, SEGMENT)
    partial_ptr += n.to(tl.int64) * most_segments * 2
    u_max = tl.full([], _LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    for k in range(tl.program_id(1), segments, programs):
        end = tl.minimum((k + 1) * SEGMENT, groups)
        m, s = _segment(body_ptr, k * SEGMENT, end, a, scale, SOFTCAP, LANES, VEC)
        u_max, total = _merge(u_max, total, m, s, scale)
        tl.store(partial_ptr + 2 * k, m, mask=programs > 1)
        tl.store(partial_ptr + 2 * k + 1, s, mask=programs > 1)

    is_last = programs == 1
    if programs > 1:
        # the last of the row's programs to arrive merges the segments, in the order in which one program would have
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + n, 1, sem="acq_rel") == programs - 1
        if is_last:
            tl.store(arrived_ptr + n, 0)
            u_max = tl.full([], _LOWEST, tl.float32)
            total = tl.zeros([], tl.float32)
            for k in range(0, segments):
                m = tl.load(partial_ptr + 2 * k)
                u_max, total = _merge(u_max, total, m, tl.load(partial_ptr + 2 * k + 1), scale)
    if is_last:
        m = tl.maximum(tl.max(u_edge, axis=0), _LOWEST)
        u_max, total = _merge(u_max, total, m, tl.sum(tl.exp2(tl.fma(u_edge, scale, -(m * scale))), axis=0), scale)
        # the sums are relative to the rounded u_max * scale
        rounding = tl.fma(u_max, scale, -(u_max * scale))
        ordinary = (total > 0.0) & (total < float("inf"))
        if not ordinary:
            u_max, total = _max_and_sum_in_two_passes(row_ptr, V, a, scale, SOFTCAP, 4 * LANES, VEC)
            rounding = 0.0
        log_total = tl.log(total) - rounding * LN2
        # float64: the backward subtracts it from logits as large as itself
        u_max_wide = u_max.to(tl.float64)
        lse = u_max_wide * factor + u_max_wide * factor_lost + log_total
        tl.store(lse_ptr + n, lse)
        # The difference before the scale: a constant added to the whole row costs no digits. Nor do these roundings.
        difference, lost = _sum_and_rounding(u_label, -u_max)
        product = difference * factor
        lost = tl.fma(lost, factor, tl.fma(difference, factor, -product)) + difference * factor_lost
        logp, lost_again = _sum_and_rounding(product, -log_total)
        lost += lost_again
        logp += tl.where(tl.abs(lost) < float("inf"), lost, 0.0)  # NaN where something was infinite
        # rounding may leave a probability a hair above 1; the comparison lets NaN through
        logp = tl.where(logp > 0, 0.0, logp)
        tl.store(logp_ptr + n, tl.where(label == -1, -lse.to(tl.float32), logp))


def _programs_per_row(N: int, segments: int) -> int:
    """One where rows alone fill the GPU: 528 programs are four on each of 132 multiprocessors, 32 KiB in flight."""
    return max(1, min(segments, triton.cdiv(528, N)))


def token_logp_fwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous, any strides before it
    rows: torch.Tensor,  # (N,) int64: position b * T + t
    labels: torch.Tensor,  # (N,) int64
    a: float,
    c: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # logp (N,) float32, lse (N,) float64
    """log_softmax(z)[label] of each row and logsumexp(z), natural, for z = a * x or c * tanh(a * x); a > 0 and c >= 0.

    A label of -1 counts as a logit of 0 that is no part of the sum (logp = -lse); others outside [0, V) give NaN.
    """
    assert a > 0 and c >= 0, (a, c)
    N, (_, T, V) = rows.shape[0], logits.shape
    logp = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty(N, dtype=torch.float64, device=logits.device)
    if N == 0:
        return logp, lse
    launch = row_launch(V, logits.dtype)
    segments = triton.cdiv(V // launch["VEC"], 4 * launch["LANES"] * _PASSES.value)
    programs = _programs_per_row(N, segments)
    partial, arrived = logp, logp  # addresses that are not used
    if programs > 1:
        partial = torch.empty((N, segments, 2), dtype=torch.float32, device=logits.device)
        arrived = arrival_counters(logits.device)
    factor = c if c else a
    with on_device(logits):
        _token_logp_fwd_kernel[(N, programs)](
            logits, rows, labels, logp, lse, partial, arrived,
            T, logits.stride(0), logits.stride(1), V, segments, a, *two_floats(factor), factor * LOG2E.value,
            SOFTCAP=c != 0, **launch,
        )  # fmt: skip
    return logp, lse
