# SPDX-License-Identifier: Apache-2.0
"""Step kernel: from the log-probs of rows to step sums, losses and the gradient of every log-prob, in one launch.

There is a program per step. It sums its own rows, and once more the rows of every step it is paired with. Those sums
cost less than a second launch or a grid barrier. The same instructions make them in the same order, so they are bit for
bit the partner's own.
"""

import torch
import triton
import triton.language as tl

from ...formulas.registry import formula_id
from ..arguments import StepLossArguments
from .formulas_generated import _pair_formula
from .rows import arrival_counters, jit, on_device

BLOCK = 256  # rows summed at a time: steps are tens to hundreds of tokens


@triton.jit
def _step_sum(logp_ptr, weights_ptr, step_offsets_ptr, k, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """(sum of step k, its first row, past its last row)."""
    begin = tl.load(step_offsets_ptr + k)
    end = tl.load(step_offsets_ptr + k + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(begin, end, BLOCK):
        o = n + tl.arange(0, BLOCK)
        logp = tl.load(logp_ptr + o, mask=o < end, other=0.0)
        if HAS_WEIGHTS:
            logp *= tl.load(weights_ptr + o, mask=o < end, other=0.0).to(tl.float32)
        total += logp
    return tl.sum(total, axis=0), begin, end


@triton.jit
def _given(ptr, i, absent, IS_GIVEN: tl.constexpr):
    """Element i, or `absent` for an input that the call does not have."""
    if IS_GIVEN:
        return tl.load(ptr + i).to(tl.float32)
    else:
        return absent


@triton.jit
def _write_coefs(coef_ptr, weights_ptr, begin, end, coef, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    for n in range(begin, end, BLOCK):
        o = n + tl.arange(0, BLOCK)
        if HAS_WEIGHTS:
            tl.store(
                coef_ptr + o, coef * tl.load(weights_ptr + o, mask=o < end, other=0.0).to(tl.float32), mask=o < end
            )
        else:
            tl.store(coef_ptr + o, tl.zeros([BLOCK], tl.float32) + coef, mask=o < end)


@triton.jit
def _sum_of_pair_losses(pair_loss_ptr, pair_weights_ptr, P, HAS_PAIR_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(0, P, BLOCK):
        o = p + tl.arange(0, BLOCK)
        loss = tl.load(pair_loss_ptr + o, mask=o < P, other=0.0)
        if HAS_PAIR_WEIGHTS:
            loss *= tl.load(pair_weights_ptr + o, mask=o < P, other=0.0).to(tl.float32)
        total += loss
    return tl.sum(total, axis=0)


@jit
def _step_loss_fwd_kernel(
    logp_ptr,  # (N,) float32
    weights_ptr,  # (N,)
    step_offsets_ptr,  # (S + 1,) int32
    ref_ptr,  # (S,)
    pair_index_ptr,  # (P, 2) int32
    adj_offsets_ptr,  # (S + 1,) int32
    adj_pairs_ptr,  # (2 * P,) int32: 2 * pair + (1 if the step is the loser)
    pair_weights_ptr,  # (P,)
    pair_margins_ptr,  # (P,)
    pair_labels_ptr,  # (P,)
    scale_ptr,  # ()
    loss_ptr,  # () float32
    sums_ptr,  # (S,) float32
    pair_loss_ptr,  # (P,) float32
    coef_ptr,  # (N,) float32
    arrived_ptr,  # one int32, zero before and after
    P: tl.int32,
    label: tl.float32,
    o0: tl.float32,
    o1: tl.float32,
    o2: tl.float32,
    o3: tl.float32,
    FORMULA: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    HAS_MARGINS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0)
    u, begin, end = _step_sum(logp_ptr, weights_ptr, step_offsets_ptr, k, HAS_WEIGHTS, BLOCK)
    tl.store(sums_ptr + k, u)
    if HAS_REF:
        u -= tl.load(ref_ptr + k).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)

    du = 0.0
    for j in range(tl.load(adj_offsets_ptr + k), tl.load(adj_offsets_ptr + k + 1)):
        entry = tl.load(adj_pairs_ptr + j)
        pair = entry >> 1
        is_loser = (entry & 1) == 1
        other = tl.load(pair_index_ptr + (entry ^ 1))
        u_other, other_begin, other_end = _step_sum(logp_ptr, weights_ptr, step_offsets_ptr, other, HAS_WEIGHTS, BLOCK)
        if HAS_REF:
            u_other -= tl.load(ref_ptr + other).to(tl.float32)
        valid = (end > begin) & (other_end > other_begin)
        # a pair with an empty step is evaluated at 0, as in the reference, so that nothing undefined comes of it
        u_own = tl.where(valid, u, 0.0)
        u_other = tl.where(valid, u_other, 0.0)
        n_own = tl.maximum(end - begin, 1).to(tl.float32)
        n_other = tl.maximum(other_end - other_begin, 1).to(tl.float32)
        margin = _given(pair_margins_ptr, pair, 0.0, HAS_MARGINS)
        q = _given(pair_labels_ptr, pair, label, HAS_LABELS)  # a name makes a float32 of it in the interpreter too
        loss, du_w, du_l = _pair_formula(
            FORMULA,
            tl.where(is_loser, u_other, u_own),
            tl.where(is_loser, u_own, u_other),
            tl.where(is_loser, n_other, n_own),
            tl.where(is_loser, n_own, n_other),
            margin, q,
            o0, o1, o2, o3,
        )  # fmt: skip
        d = tl.where(is_loser, du_l, du_w)
        if HAS_PAIR_WEIGHTS:
            d *= tl.load(pair_weights_ptr + pair).to(tl.float32)
        du += tl.where(valid, d, 0.0)
        tl.store(pair_loss_ptr + pair, tl.where(valid, loss, 0.0), mask=entry & 1 == 0)

    _write_coefs(coef_ptr, weights_ptr, begin, end, du * scale, HAS_WEIGHTS, BLOCK)

    # The last program to arrive sees every pair's loss. It adds them in the order of the pairs, so it does not matter
    # which program is last.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = _sum_of_pair_losses(pair_loss_ptr, pair_weights_ptr, P, HAS_PAIR_WEIGHTS, BLOCK)
        tl.store(loss_ptr, total * scale)
        tl.store(arrived_ptr, 0)


def step_loss_fwd(given: StepLossArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (), sums (S,), pair_loss (P,) unweighted, coef (N,) = dloss/dlogp; all float32.

    A pair with an empty step has loss 0 and gives no gradient.
    """
    logps, weights, step_offsets, ref, pair_index, adj_offsets, adj_pairs, *per_pair = given[:10]
    pair_weights, pair_margins, pair_labels = per_pair
    S, P = step_offsets.shape[0] - 1, pair_index.shape[0]
    device = logps.device
    sums = torch.empty(S, dtype=torch.float32, device=device)
    pair_loss = torch.empty(P, dtype=torch.float32, device=device)
    if S == 0:  # no program would write the loss
        return torch.zeros((), dtype=torch.float32, device=device), sums, pair_loss, torch.zeros_like(logps)
    loss = torch.empty((), dtype=torch.float32, device=device)
    coef = torch.empty_like(logps)
    o0, o1, o2, o3 = [*given.options, 0.0, 0.0, 0.0, 0.0][:4]
    absent = sums  # a valid address for what the kernel is compiled not to read
    with on_device(logps):
        _step_loss_fwd_kernel[(S,)](
            logps, absent if weights is None else weights, step_offsets, absent if ref is None else ref,
            pair_index, adj_offsets, adj_pairs,
            absent if pair_weights is None else pair_weights, absent if pair_margins is None else pair_margins,
            absent if pair_labels is None else pair_labels,
            given.scale, loss, sums, pair_loss, coef, arrival_counters(device), P, given.label, o0, o1, o2, o3,
            FORMULA=formula_id(given.formula), HAS_WEIGHTS=weights is not None, HAS_REF=ref is not None,
            HAS_PAIR_WEIGHTS=pair_weights is not None, HAS_MARGINS=pair_margins is not None,
            HAS_LABELS=pair_labels is not None, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, sums, pair_loss, coef
