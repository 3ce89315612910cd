# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: how a row of logits is walked, its label and its edges, launch settings.

A row is [lead | groups of 16 bytes | tail]. The groups begin at the row's first 16-byte boundary, so the loops move 16
bytes a lane whatever V and the row's address are. Lead and tail, the row's edges, are shorter than 16 bytes each and
are one masked access together.

The label of a row is a column in [0, V), or -1: the vocabulary is split over ranks and the label is in another rank's
shard. A label of -1 has a log-prob of -lse, and its gradient has no one-hot term. Any other label is an error: its
log-prob is NaN, and so is its whole row of the gradient.
"""

import ctypes
import inspect

import torch
import triton
import triton.language as tl

from ..addresses import in_private_pool

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_COUNTERS = 1024
WARP = 64 if torch.version.hip else 32  # threads

# Running maxima start here and not at -inf: a lane that has met only -inf (masked vocabulary) then has weights
# exp2(-inf) = 0 instead of NaN. Scaled, it must stay finite. Rows that lie below it altogether are summed again,
# relative to their own maximum.
LOWEST = tl.constexpr(-1e30)
# From here on a float32 exponent has no digits behind its point.
_FAR = tl.constexpr(2.0**24)
# Up to here a float64 lse still resolves log V, and `scale` over its factor is exact enough as two floats.
_FARTHEST = tl.constexpr(2.0**46)


def jit(fn):
    """`triton.jit` with one binary per (dtypes, constexprs).

    Triton would otherwise compile a variant for every divisibility of V, of the strides and of the pointers. The
    kernels find the 16-byte boundaries of a row themselves, so variants would gain nothing, and the first odd V of a
    run would wait for a compilation.
    """
    parameters = inspect.signature(fn).parameters.values()
    return triton.jit(fn, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


def row_launch(V: int, dtype: torch.dtype, warp: int = WARP) -> dict[str, int | bool]:
    """LANES, VEC and compile options of the row kernels.

    They depend on V and dtype alone, so there are few binaries and every call gives the same bits.

    A thread is a lane: it owns VEC elements (16 bytes) of each of four tiles, so a pass of the loop has 64 bytes a
    thread in flight. Four warps and not more: about eight programs then share a multiprocessor, and the loop of one
    hides the prologue and the reduction of another. Rows that four warps would pass over only once or twice get one
    warp, because a reduction over warps would cost more than the row.
    """
    vec = 16 // dtype.itemsize
    num_warps = 4 if V >= 2 * 4 * 128 * vec else 1
    # Fusion off: what must round once is written as an fma, and a product that is used again must round by itself.
    return {"LANES": num_warps * warp, "VEC": vec, "num_warps": num_warps, "enable_fp_fusion": False}


def column_shares(positions: int, V: int, step: int) -> int:
    """Programs per row of a backward.

    Where rows are few, they are enough for ten programs on each of about 130 multiprocessors, but no program has less
    than one full pass of `step` elements.
    """
    return max(1, min(triton.cdiv(1320, positions), V // step))


def lies_alike(x: torch.Tensor, y: torch.Tensor, vec: int) -> bool:
    """Whether every row of y has its 16-byte boundaries at the same columns as that of x."""
    same_place = (x.data_ptr() - y.data_ptr()) % 16 == 0
    return same_place and all((x.stride(d) - y.stride(d)) % vec == 0 or x.shape[d] == 1 for d in (0, 1))


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)  # does nothing for a CPU tensor


def two_floats(x: float) -> tuple[float, float]:
    """X as a float32 and the rest: kernels take no float64 scalars."""
    high = ctypes.c_float(x).value
    return high, x - high


def softcap_kind(c: float) -> int:
    """SOFTCAP of the kernels: 0 without a softcap, 1 for a narrow one, 2 for a wide one, which multiplies errors."""
    return 0 if c == 0 else 1 if c <= 40 else 2


def forward_map(a: float, c: float) -> tuple[float, float, float, float]:
    """a, factor, factor_lost and scale of the forward kernels, for z = a * x or, if c > 0, z = c * tanh(a * x)."""
    assert a > 0 and c >= 0, (a, c)
    factor = c if c else a
    return a, *two_floats(factor), factor * LOG2E.value


def backward_map(a: float, c: float) -> tuple[float, float, float, float, float]:
    """a, slope, scale, per_lse and per_lse_lost of the backward kernels, for the same z."""
    assert a > 0 and c >= 0, (a, c)
    factor = c if c else a
    scale, _ = two_floats(factor * LOG2E.value)
    return a, a * c if c else a, scale, *two_floats(scale / factor)


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeros in which programs count themselves. The kernels leave them zero, so no launch is needed to clear them.

    One tensor per stream: launches on one stream do not overlap. Memory of a CUDA graph is the graph's, which zeroes it
    in each replay: it is not kept.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None:
        counters = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
        if not in_private_pool(counters):
            _counters[key] = counters
    return counters


@triton.jit
def row_offset(i, T, stride_b, stride_t):
    """Elements from the first logit to position i = b * T + t; all int64, N * V exceeds 2^31 in practice."""
    return (i // T) * stride_b + (i % T) * stride_t


@triton.jit
def aligned_part(row_ptr, V, VEC: tl.constexpr):
    """(lead, groups): elements before the row's first 16-byte boundary, and whole groups of 16 bytes after it.

    Rows start anywhere: V is odd, or the logits are a slice.
    """
    ITEM: tl.constexpr = 16 // VEC
    lead = ((0 - row_ptr.to(tl.int64)) & 15).to(tl.int32) // ITEM
    return lead, tl.maximum(V - lead, 0) // VEC


@triton.jit
def edge_columns(lead, groups, V, VEC: tl.constexpr):
    """(2 * VEC,) columns of lead and tail, [0, lead) and [lead + groups * VEC, V), and which of them exist."""
    e = tl.arange(0, 2 * VEC)
    columns = tl.where(e < VEC, e, lead + groups * VEC + e - VEC)
    return columns, (columns < V) & ((e < lead) | (e >= VEC))


@triton.jit
def _load_tile(ptr, lanes, MASKED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(LANES, VEC) float32 from the elements at `ptr`, VEC to a lane; lanes from `lanes` on get -inf."""
    lane = tl.arange(0, LANES)[:, None]
    if (ALIGNED and not MASKED) and ptr.dtype.element_ty == tl.bfloat16:
        # two bfloat16 in a word are a shift and a mask; as 16-bit values they would cost a third instruction
        o = lane * (VEC // 2) + tl.arange(0, VEC // 2)[None, :]
        w = tl.load(ptr.to(tl.pointer_type(tl.int32)) + o)
        return tl.interleave((w << 16).to(tl.float32, bitcast=True), (w & -65536).to(tl.float32, bitcast=True))
    else:
        o = lane * VEC + tl.arange(0, VEC)[None, :]
        if MASKED:
            return tl.load(ptr + o, mask=lane < lanes, other=float("-inf")).to(tl.float32)
        else:
            return tl.load(ptr + o).to(tl.float32)


@triton.jit
def load_tiles(ptr, lanes, MASKED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Four tiles (LANES, VEC) of consecutive elements; of their 4 * LANES groups the first `lanes` if MASKED, else all.

    ALIGNED: `ptr` is a 16-byte boundary. The caller has said so with `tl.multiple_of`, since a hint given to a
    parameter is lost when the function is inlined.
    """
    TILE: tl.constexpr = LANES * VEC
    x0 = _load_tile(ptr, lanes, MASKED, ALIGNED, LANES, VEC)
    x1 = _load_tile(ptr + TILE, lanes - LANES, MASKED, ALIGNED, LANES, VEC)
    x2 = _load_tile(ptr + 2 * TILE, lanes - 2 * LANES, MASKED, ALIGNED, LANES, VEC)
    x3 = _load_tile(ptr + 3 * TILE, lanes - 3 * LANES, MASKED, ALIGNED, LANES, VEC)
    return x0, x1, x2, x3


@triton.jit
def store_tiles(ptr, x0, x1, x2, x3, lanes, MASKED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """The counterpart of `load_tiles`; `ptr` is a 16-byte boundary."""
    TILE: tl.constexpr = LANES * VEC
    lane = tl.arange(0, LANES)[:, None]
    ptr += lane * VEC + tl.arange(0, VEC)[None, :]
    dtype = ptr.dtype.element_ty
    if MASKED:
        tl.store(ptr, x0.to(dtype), mask=lane < lanes)
        tl.store(ptr + TILE, x1.to(dtype), mask=lane < lanes - LANES)
        tl.store(ptr + 2 * TILE, x2.to(dtype), mask=lane < lanes - 2 * LANES)
        tl.store(ptr + 3 * TILE, x3.to(dtype), mask=lane < lanes - 3 * LANES)
    else:
        tl.store(ptr, x0.to(dtype))
        tl.store(ptr + TILE, x1.to(dtype))
        tl.store(ptr + 2 * TILE, x2.to(dtype))
        tl.store(ptr + 3 * TILE, x3.to(dtype))


@triton.jit
def tanh_sech2(y, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """(tanh y, 1 - tanh^2 y) with an absolute error of 1e-7. 1 - tanh^2 keeps its digits where tanh is close to 1.

    No target has an accurate tanh instruction. tanh has a relative error too, and half a unit in the last place where
    it is close to 1, except for 16-bit logits under a narrow cap, whose own rounding hides the difference.
    """
    t = tl.exp2(-2.8853900817779268 * tl.abs(y))  # e^(-2|y|)
    # 1 / (1 + t) by iteration: a division costs more instructions, and a special function, which are scarcer still
    w = 1 + t
    inverse = tl.fma(w, -8 / 17, 24 / 17)  # off by 1/17, then 1/17^3, then 1/17^6
    e = tl.fma(-w, inverse, 1.0)
    inverse = tl.fma(tl.fma(e, e, e), inverse, inverse)
    inverse = tl.fma(tl.fma(-w, inverse, 1.0), inverse, inverse)
    part = t * inverse
    if VEC == 4 or SOFTCAP == 2:
        size = tl.fma(part, -2.0, 1.0)
    else:
        size = (1 - t) * inverse
    r = (size.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
    if VEC == 4 or SOFTCAP == 2:
        # 1 - t cancels near 0: tanh(y) / y as a polynomial in y^2, relative error 4.4e-8 for |y| < 0.56
        q = y * y
        p = tl.fma(tl.fma(tl.fma(q, 0.016274091, -0.05258697), q, 0.13319422), q, -0.33332891)
        r = tl.where(tl.abs(y) < 0.55, y * tl.fma(p, q, 1.0), r)
    return r, 4 * part * inverse


# Forward. The kernels work on u, from which z = factor * u: u = tanh(a * x) with SOFTCAP, else u = x.


@triton.jit
def mapped(x, a, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """U of the logits x."""
    if SOFTCAP:
        x, _ = tanh_sech2(a * x, SOFTCAP, VEC)
    return x


@triton.jit
def _without_masked_lanes(x, lanes, LANES: tl.constexpr):
    """The softcap maps the -inf of a masked lane to -1, which would count like any other value."""
    return tl.where(tl.arange(0, LANES)[:, None] < lanes, x, float("-inf"))


@triton.jit
def mapped_tiles(
    ptr, lanes, a, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """U of the four tiles (LANES, VEC) that `load_tiles` gives, and the largest of each lane, (LANES,)."""
    x0, x1, x2, x3 = load_tiles(ptr, lanes, MASKED, ALIGNED, LANES, VEC)
    if SOFTCAP:
        x0 = mapped(x0, a, SOFTCAP, VEC)
        x1 = mapped(x1, a, SOFTCAP, VEC)
        x2 = mapped(x2, a, SOFTCAP, VEC)
        x3 = mapped(x3, a, SOFTCAP, VEC)
        if MASKED:
            x0 = _without_masked_lanes(x0, lanes, LANES)
            x1 = _without_masked_lanes(x1, lanes - LANES, LANES)
            x2 = _without_masked_lanes(x2, lanes - 2 * LANES, LANES)
            x3 = _without_masked_lanes(x3, lanes - 3 * LANES, LANES)
    return x0, x1, x2, x3, tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=1)


@triton.jit
def mapped_edges(row_ptr, columns, at_edge, a, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """(2 * VEC,) u at the columns of `edge_columns`; -inf where there is none."""
    x = tl.load(row_ptr + columns, mask=at_edge, other=float("-inf")).to(tl.float32)
    return tl.where(at_edge, mapped(x, a, SOFTCAP, VEC), float("-inf"))


@triton.jit
def mapped_label(row_ptr, label, V, a, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """U at the label; NaN for a label outside [0, V)."""
    x = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=float("nan"))
    return mapped(x.to(tl.float32), a, SOFTCAP, VEC)


@triton.jit
def max_of_row(row_ptr, V, a, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The largest u of a row, in a pass of its own; 0 if all are -inf, so that sums relative to it are 0."""
    o = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(row_ptr + v + o, mask=o < V - v, other=float("-inf")).to(tl.float32)
        m = tl.maximum(m, tl.where(o < V - v, mapped(x, a, SOFTCAP, VEC), float("-inf")))
    top = tl.max(m, axis=0)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def row_lse(top, log_total, factor, factor_lost):
    """Factor * top + log_total. float64: the backward subtracts it from logits as large as itself."""
    wide = top.to(tl.float64)
    return wide * factor + wide * factor_lost + log_total


@triton.jit
def _sum_and_rounding(x, y):
    """(x + y rounded, what the rounding lost)."""
    total = x + y
    y_part = total - x
    return total, (x - (total - y_part)) + (y - y_part)


@triton.jit
def log_prob(u_label, label, top, log_total, lse, factor, factor_lost):
    """Factor * (u_label - top) - log_total, with what every rounding lost added back; -lse for a label of -1.

    The difference comes before the factor, so a constant added to the whole row costs no digits.
    """
    difference, lost = _sum_and_rounding(u_label, -top)
    product = difference * factor
    lost = tl.fma(lost, factor, tl.fma(difference, factor, -product)) + difference * factor_lost
    logp, lost_again = _sum_and_rounding(product, -log_total)
    lost += lost_again
    logp += tl.where(tl.abs(lost) < float("inf"), lost, 0.0)  # NaN where something was infinite
    # rounding may leave a probability a hair above 1; the comparison lets NaN through
    logp = tl.where(logp > 0, 0.0, logp)
    return tl.where(label == -1, -lse.to(tl.float32), logp)


# Backward. Several programs may share a row of the gradient; each row is walked by the gradient's boundaries.


@triton.jit
def _has_edges():
    return tl.program_id(1) == tl.num_programs(1) - 1


@triton.jit
def row_share(out_row_ptr, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """This program's share of a row: (lead, groups, begin, loop_end, end, columns, at_edge).

    The share is groups [begin, end); up to loop_end they fill whole passes of four tiles. The edges belong to the row's
    last program, and at_edge is false for the others.
    """
    STEP: tl.constexpr = 4 * LANES
    lead, groups = aligned_part(out_row_ptr, V, VEC)
    share = tl.cdiv(tl.cdiv(groups, STEP), tl.num_programs(1)) * STEP
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, groups)
    loop_end = tl.maximum(begin + (end - begin) // STEP * STEP, begin)
    columns, at_edge = edge_columns(lead, groups, V, VEC)
    at_edge = at_edge & (columns < tl.where(_has_edges(), V, 0))
    return lead, groups, begin, loop_end, end, columns, at_edge


@triton.jit
def owns_label(label, lead, groups, begin, end, V, VEC: tl.constexpr):
    """Whether the label's column is in this program's share; never for a label outside [0, V)."""
    group = (label - lead) // VEC  # at the edges negative, or past the last
    at_edge = (label < lead) | (group >= groups)
    mine = tl.where(at_edge, _has_edges(), (group >= begin) & (group < end))
    return mine & (label >= 0) & (label < V)


@triton.jit
def nan_for_wrong_label(x, label, V):
    """x; NaN for a label that is neither in [0, V) nor -1."""
    return tl.where((label >= -1) & (label < V), x, float("nan"))


@triton.jit
def write_zeros(out_row_ptr, out_body_ptr, begin, loop_end, end, columns, at_edge, LANES: tl.constexpr,
                VEC: tl.constexpr):  # fmt: skip
    """Zeros in this program's share of a row that has no gradient."""
    zero = tl.zeros([LANES, VEC], tl.float32)
    for g in range(begin, loop_end, 4 * LANES):
        store_tiles(out_body_ptr + g * VEC, zero, zero, zero, zero, 0, False, LANES, VEC)
    if loop_end < end:
        store_tiles(out_body_ptr + loop_end * VEC, zero, zero, zero, zero, end - loop_end, True, LANES, VEC)
    tl.store(out_row_ptr + columns, tl.zeros([2 * VEC], tl.float32).to(out_row_ptr.dtype.element_ty), mask=at_edge)


@triton.jit
def label_and_edges(row_ptr, label, mine, columns, at_edge):
    """(logit of the label, (2 * VEC,) logits of the edges); only what this program owns."""
    x_label = tl.load(row_ptr + label, mask=mine, other=0.0).to(tl.float32)
    return x_label, tl.load(row_ptr + columns, mask=at_edge, other=0.0).to(tl.float32)


@triton.jit
def row_shift(lse, scale, per_lse, per_lse_lost, SOFTCAP: tl.constexpr):
    """(shift, lost, centre): softmax = 2^(scale * (u - centre) + shift + lost), where `lost` is what float32 cuts off.

    The centre is 0 unless the logits are so large that scale * u has no digits left. Then it is close to their maximum.
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
def label_weight(weight, x_label, a, SOFTCAP: tl.constexpr, VEC: tl.constexpr):
    """weight, times the softcap's share of dz/dx at the label."""
    if SOFTCAP:
        _, sech2 = tanh_sech2(a * x_label, SOFTCAP, VEC)
        weight = weight * sech2
    return weight
