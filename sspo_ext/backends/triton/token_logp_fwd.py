# SPDX-License-Identifier: Apache-2.0
"""Row forward: the log-probability of one label per row, and the row's log-sum-exp, in one read of the row.

Rows are walked by their own 16-byte boundaries (rows.py).
"""

import functools

import torch
import triton
import triton.language as tl

from .rows import (
    LN2,
    LOWEST,
    aligned_part,
    arrival_counters,
    edge_columns,
    forward_map,
    jit,
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

# Passes of the loop between two reductions over the block. The reductions cut a row into segments that several programs
# can share, with the same bits however many they are. Four passes are 64 elements a thread, enough to hide a reduction.
_PASSES = tl.constexpr(4)


@triton.jit
def _accumulate(
    m, s, ptr, lanes, a, scale, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """Adds four tiles (LANES, VEC) to each lane's maximum m (LANES,) and sums s (LANES, VEC) of exp2(scale * (u - m)).

    One maximum for 4 * VEC elements makes rescaling cheap. Each lane has its own, so threads exchange nothing in the
    loop.
    """
    x0, x1, x2, x3, m_new = mapped_tiles(ptr, lanes, a, MASKED, SOFTCAP, True, LANES, VEC)
    m_new = tl.maximum(m, m_new)
    top = m_new * scale
    rescale = tl.exp2(m * scale - top)[:, None]
    shift = -top[:, None]
    p = tl.exp2(tl.fma(x0, scale, shift)) + tl.exp2(tl.fma(x1, scale, shift))
    q = tl.exp2(tl.fma(x2, scale, shift)) + tl.exp2(tl.fma(x3, scale, shift))
    return m_new, tl.fma(s, rescale, p + q)


@triton.jit
def _segment(body_ptr, begin, end, a, scale, SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(max, sum of exp2(scale * (u - max))) over 16-byte groups [begin, end) of a row."""
    m = tl.full([LANES], LOWEST, tl.float32)
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
    """The (max, sum) of two parts of a row together."""
    top = tl.maximum(m, m_new)
    return top, total * tl.exp2(m * scale - top * scale) + total_new * tl.exp2(m_new * scale - top * scale)


@triton.jit
def _max_and_sum_in_two_passes(row_ptr, V, a, scale, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(max, sum of exp2(scale * (u - max))), the max first.

    For rows so large that scale * u overflows or its rounding
    matters, and rows that lie below LOWEST altogether.
    """
    o = tl.arange(0, BLOCK)
    top = max_of_row(row_ptr, V, a, SOFTCAP, BLOCK, VEC)
    s = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(row_ptr + v + o, mask=o < V - v, other=float("-inf")).to(tl.float32)
        s += tl.where(o < V - v, tl.exp2((mapped(x, a, SOFTCAP, VEC) - top) * scale), 0.0)
    return top, tl.sum(s, axis=0)


@jit
def _token_logp_fwd_kernel(
    logits_ptr,  # (B, T, V)
    rows_ptr,  # (N,) int64
    labels_ptr,  # (N,) int64; -1: in another shard; others outside [0, V): NaN
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
    lead, groups = aligned_part(row_ptr, V, VEC)
    body_ptr = tl.multiple_of(row_ptr + lead, 16)
    # read before the loop, which hides their latency
    label = tl.load(labels_ptr + n)
    u_label = mapped_label(row_ptr, label, V, a, SOFTCAP, VEC)
    columns, at_edge = edge_columns(lead, groups, V, VEC)
    u_edge = mapped_edges(row_ptr, columns, at_edge, a, SOFTCAP, VEC)

    SEGMENT: tl.constexpr = 4 * LANES * _PASSES
    segments = tl.cdiv(groups, SEGMENT)
    partial_ptr += n.to(tl.int64) * most_segments * 2
    u_max = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    for k in range(tl.program_id(1), segments, programs):
        end = tl.minimum((k + 1) * SEGMENT, groups)
        m, s = _segment(body_ptr, k * SEGMENT, end, a, scale, SOFTCAP, LANES, VEC)
        u_max, total = _merge(u_max, total, m, s, scale)
        tl.store(partial_ptr + 2 * k, m, mask=programs > 1)
        tl.store(partial_ptr + 2 * k + 1, s, mask=programs > 1)

    is_last = programs == 1
    if programs > 1:
        # The last of the row's programs to arrive merges the segments, in the order that one program would take.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + n, 1, sem="acq_rel") == programs - 1
        if is_last:
            tl.store(arrived_ptr + n, 0)
            u_max = tl.full([], LOWEST, tl.float32)
            total = tl.zeros([], tl.float32)
            for k in range(0, segments):
                m = tl.load(partial_ptr + 2 * k)
                u_max, total = _merge(u_max, total, m, tl.load(partial_ptr + 2 * k + 1), scale)
    if is_last:
        m = tl.maximum(tl.max(u_edge, axis=0), LOWEST)
        u_max, total = _merge(u_max, total, m, tl.sum(tl.exp2(tl.fma(u_edge, scale, -(m * scale))), axis=0), scale)
        # the sums are relative to the rounded u_max * scale
        rounding = tl.fma(u_max, scale, -(u_max * scale))
        ordinary = (total > 0.0) & (total < float("inf"))
        if not ordinary:
            u_max, total = _max_and_sum_in_two_passes(row_ptr, V, a, scale, SOFTCAP, 4 * LANES, VEC)
            rounding = 0.0
        log_total = tl.log(total) - rounding * LN2
        lse = row_lse(u_max, log_total, factor, factor_lost)
        tl.store(lse_ptr + n, lse)
        tl.store(logp_ptr + n, log_prob(u_label, label, u_max, log_total, lse, factor, factor_lost))


def _programs_per_row(N: int, segments: int) -> int:
    """One where the rows alone fill the GPU. 528 programs are four on each of 132 multiprocessors, 32 KiB in flight."""
    return max(1, min(segments, triton.cdiv(528, N)))


def registers(capability: tuple[int, int]) -> dict[str, int]:
    """Compile options: ptxas gives a B300's kernel 64 registers, two too few, unless it may take more."""
    return {"maxnreg": 80} if capability == (10, 3) else {}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


def token_logp_fwd(
    logits: torch.Tensor,  # (B, T, V) float32, bfloat16 or float16; last dimension contiguous, any strides before it
    rows: torch.Tensor,  # (N,) int64: position b * T + t
    labels: torch.Tensor,  # (N,) int64
    a: float,
    c: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # logp (N,) float32, lse (N,) float64
    """log_softmax(z)[label] and logsumexp(z) of each row, natural, for z = a * x or c * tanh(a * x); a > 0 and c >= 0.

    A label of -1 is in another shard of the vocabulary: logp = -lse. Others outside [0, V) give NaN.
    """
    N, (_, T, V) = rows.shape[0], logits.shape
    logp = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty(N, dtype=torch.float64, device=logits.device)
    if N == 0:
        return logp, lse
    launch = row_launch(V, logits.dtype)
    segments = triton.cdiv(V // launch["VEC"], 4 * launch["LANES"] * _PASSES.value)
    programs = _programs_per_row(N, segments)
    # addresses that are not used, of the types that are: another type would be another binary
    partial, arrived = logp, torch.empty(0, dtype=torch.int32, device=logits.device)
    if programs > 1:
        partial = torch.empty((N, segments, 2), dtype=torch.float32, device=logits.device)
        arrived = arrival_counters(logits.device)
    with on_device(logits):
        _token_logp_fwd_kernel[(N, programs)](
            logits, rows, labels, logp, lse, partial, arrived,
            T, logits.stride(0), logits.stride(1), V, segments, *forward_map(a, c),
            SOFTCAP=softcap_kind(c), **launch, **registers(_capability(logits.device)),
        )  # fmt: skip
    return logp, lse
