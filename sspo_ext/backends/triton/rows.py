"""What every Triton kernel here shares: compilation without specialisation, 16-byte access to rows that start
anywhere, softcap's tanh.
"""

import inspect

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_COUNTERS = 1024
WARP = 64 if torch.version.hip else 32  # threads


def jit(fn):
    """`triton.jit` with one binary per (dtypes, constexprs).

    Triton would otherwise compile a variant for every divisibility of V, of the strides and of the pointers. The
    kernels find the 16-byte boundaries of a row themselves, so nothing is gained by it, and the first odd V of a run
    would wait for a compilation.
    """
    parameters = inspect.signature(fn).parameters.values()
    return triton.jit(fn, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


def row_launch(V: int, dtype: torch.dtype, warp: int = WARP) -> dict[str, int | bool]:
    """LANES, VEC and compile options of the row kernels, from V and dtype alone: few binaries, and the same bits on
    every call.

    A thread is a lane: it owns VEC elements (16 bytes) of each of four tiles, so a pass of the loop is 64 bytes in
    flight a thread. Four warps, not more: some eight programs then share a multiprocessor, and one's prologue and
    reduction hide behind another's loop. One warp for rows that four would pass over only once or twice, where the
    reduction over warps would weigh more than the row.
    """
    vec = 16 // dtype.itemsize
    num_warps = 4 if V >= 2 * 4 * 128 * vec else 1
    # Fusion off: what must round once is written as an fma, and what must round twice (a product used again later)
    # stays two roundings.
    return {"LANES": num_warps * warp, "VEC": vec, "num_warps": num_warps, "enable_fp_fusion": False}


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)  # does nothing for a CPU tensor


def two_floats(x: float) -> tuple[float, float]:
    """x as a float32 and the rest: kernels take no float64 scalars."""
    high = torch.tensor(x, dtype=torch.float32, device="cpu").item()
    return high, x - high


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrival_counters(device: torch.device) -> torch.Tensor:
    """Zeros for programs to count themselves in, in kernels that leave them zero: no launch of their own is needed.

    One tensor per stream: what is launched on one stream does not overlap.
    """
    if device.type == "cpu":
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():  # zeroed by each replay, and not kept: a graph's memory is the graph's
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


@triton.jit
def row_offset(i, T, stride_b, stride_t):
    """Elements from the first logit to position i = b * T + t; all int64, N * V exceeds 2^31 in practice."""
    return (i // T) * stride_b + (i % T) * stride_t


@triton.jit
def head_length(row_ptr, VEC: tl.constexpr):
    """Elements before the row's first 16-byte boundary; rows start anywhere: V is odd, or the logits are a slice."""
    ITEM: tl.constexpr = 16 // VEC
    return ((0 - row_ptr.to(tl.int64)) & 15).to(tl.int32) // ITEM


@triton.jit
def edge_columns(head, groups, V, VEC: tl.constexpr):
    """Columns of the ragged ends, fewer than VEC elements each: [0, head) and [head + groups * VEC, V)."""
    e = tl.arange(0, 2 * VEC)
    columns = tl.where(e < VEC, e, head + groups * VEC + e - VEC)  # (2 * VEC,)
    return columns, (columns < V) & ((e < head) | (e >= VEC))


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

    ALIGNED: `ptr` is a 16-byte boundary (the caller has said so with `tl.multiple_of`: a hint given here would be
    lost in inlining).
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
def tanh_sech2(y, NARROW: tl.constexpr):
    """(tanh y, 1 - tanh^2 y) with an absolute error of 1e-7, and tanh with a relative one unless NARROW.

    No target has an accurate tanh instruction. NARROW is for 16-bit logits, whose own rounding hides the difference.
    """
    t = tl.exp2(-2.8853900817779268 * tl.abs(y))  # e^(-2|y|)
    # 1 / (1 + t) by iteration: a division costs more instructions, and a special function, which are scarcer still
    w = 1 + t
    inverse = tl.fma(w, -8 / 17, 24 / 17)  # off by 1/17, then 1/17^3, then 1/17^6
    e = tl.fma(-w, inverse, 1.0)
    inverse = tl.fma(tl.fma(e, e, e), inverse, inverse)
    inverse = tl.fma(tl.fma(-w, inverse, 1.0), inverse, inverse)
    size = (1 - t) * inverse
    r = (size.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
    if not NARROW:
        # 1 - t cancels near 0: tanh(y) / y as a polynomial in y^2, relative error 4.4e-8 for |y| < 0.56
        q = y * y
        p = tl.fma(tl.fma(tl.fma(q, 0.016274091, -0.05258697), q, 0.13319422), q, -0.33332891)
        r = tl.where(tl.abs(y) < 0.55, y * tl.fma(p, q, 1.0), r)
    return r, 4 * t * inverse * inverse
