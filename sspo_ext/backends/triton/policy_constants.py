# SPDX-License-Identifier: Apache-2.0
"""What a policy loss multiplies its rows by, in one launch: advantages, scales and the norm.

There is a program for each step or sequence over which the loss is a mean, or for each block of rows.
"""

import torch
import triton
import triton.language as tl

from ..arguments import PolicyConstantsArguments
from .policy_loss_fwd import BLOCK, WARPS
from .rows import arrival_counters, jit, on_device

NUMBER, TENSOR, ROWS, UNITS = range(4)  # what the norm comes from: 1 / items as given, or what counts here


@triton.jit
def _counted(old_ptr, o, end, threshold, HAS_THRESHOLD: tl.constexpr):
    inside = o < end
    if HAS_THRESHOLD:
        inside = inside & (tl.exp(tl.load(old_ptr + o, mask=inside, other=0.0)) < threshold)
    return inside


@jit
def _policy_constants_kernel(
    advantages_ptr,  # (S,) float32; not read where they come for each row
    step_of_row_ptr,  # (N,) int64
    weights_ptr,  # (N,)
    old_ptr,  # (N,) float32
    offsets_ptr,  # (U + 1,) int32
    items_ptr,  # (), any number
    advantage_ptr,  # (N,) float32, out
    scale_ptr,  # (N,) float32, out
    norm_ptr,  # () float32, out
    counters_ptr,  # two int32, zero before and after
    N: tl.int32,
    threshold: tl.float32,
    given_norm: tl.float32,
    BY_STEP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_UNITS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = tl.program_id(0)
    begin = u * BLOCK
    end = tl.minimum(begin + BLOCK, N)
    if HAS_UNITS:
        begin = tl.load(offsets_ptr + u)
        end = tl.load(offsets_ptr + u + 1)
    count = end - begin
    if HAS_THRESHOLD:
        counts = tl.zeros([BLOCK], tl.int32)
        for n in range(begin, end, BLOCK):
            counts += _counted(old_ptr, n + tl.arange(0, BLOCK), end, threshold, HAS_THRESHOLD).to(tl.int32)
        count = tl.sum(counts, axis=0)
    for n in range(begin, end, BLOCK):
        o = n + tl.arange(0, BLOCK)
        scale = tl.zeros([BLOCK], tl.float32) + 1.0
        if HAS_WEIGHTS:
            scale = tl.load(weights_ptr + o, mask=o < end, other=0.0).to(tl.float32)
        if HAS_UNITS:
            scale = tl.div_rn(scale, tl.zeros([BLOCK], tl.float32) + tl.maximum(count, 1).to(tl.float32))
        scale = tl.where(_counted(old_ptr, o, end, threshold, HAS_THRESHOLD), scale, 0.0)
        tl.store(scale_ptr + o, scale, mask=o < end)
        if BY_STEP:
            step = tl.load(step_of_row_ptr + o, mask=o < end, other=0)
            tl.store(advantage_ptr + o, tl.load(advantages_ptr + step, mask=o < end, other=0.0), mask=o < end)

    if NORM < 2:
        if u == 0:
            norm = given_norm
            if NORM == 1:
                items = tl.load(items_ptr).to(tl.float32)
                norm = tl.where(items > 0, tl.div_rn(1.0, items), 0.0)
            tl.store(norm_ptr, norm)
    else:
        # integers: the order of the sum does not matter
        tl.atomic_add(counters_ptr + 1, tl.where(count > 0, 1 if NORM == 3 else count, 0), sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            items = tl.atomic_xchg(counters_ptr + 1, 0).to(tl.float32)
            tl.store(norm_ptr, tl.where(items > 0, tl.div_rn(1.0, items), 0.0))
            tl.store(counters_ptr, 0)


def policy_constants(given: PolicyConstantsArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages (N,), empty where they come for each row; scales (N,); norm (). All float32."""
    N, device, offsets = given.step_of_row.shape[0], given.step_of_row.device, given.offsets
    by_step, units = given.advantages is not None, offsets is not None and offsets.shape[0] > 1
    advantage = torch.empty(N * by_step, dtype=torch.float32, device=device)
    scale = torch.empty(N, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    mode = (UNITS if offsets is not None else ROWS) if given.counts else NUMBER if given.items is None else TENSOR
    assert given.threshold == 0 or given.old is not None
    # a valid address, always of the same type, for what the kernel is compiled not to read
    offsets = offsets if units else scale.view(torch.int32)
    advantages, weights, old, items = (
        scale if x is None else x for x in (given.advantages, given.weights, given.old, given.items)
    )
    with on_device(scale):
        _policy_constants_kernel[(offsets.shape[0] - 1 if units else max(1, triton.cdiv(N, BLOCK)),)](
            advantages, given.step_of_row, weights, old, offsets, items, advantage, scale, norm,
            arrival_counters(device), N, given.threshold, given.norm,
            BY_STEP=by_step, HAS_WEIGHTS=given.weights is not None, HAS_THRESHOLD=given.threshold != 0,
            HAS_UNITS=units, NORM=mode, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return advantage, scale, norm
