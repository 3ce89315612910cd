# SPDX-License-Identifier: Apache-2.0
"""Policy kernel: from the log-probs of rows to the loss and the gradient of every log-prob, in one launch.

There is a program for each segment, whose rows share one ratio. Where each token has its own ratio, a segment is a
block of rows.
"""

import torch
import triton
import triton.language as tl

from ...formulas.policy import KL_ESTIMATORS, MAX_LOG_RATIO, MOST_POLICY_OPTIONS, POLICY_FORMULAS
from ..arguments import PolicyLossArguments
from .policy_formulas_generated import _kl_estimate, _policy_formula
from .rows import arrival_counters, jit, on_device

BLOCK = 512  # rows at a time
WARPS = 4
TOKENS, MEAN, SUM = range(3)  # whose log-ratio it is: the token's, or the mean or sum of its segment's
_MOST = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _summed_log_ratio(logp_ptr, old_ptr, begin, end, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(begin, end, BLOCK):
        o = n + tl.arange(0, BLOCK)
        logp = tl.load(logp_ptr + o, mask=o < end, other=0.0)
        total += logp - tl.load(old_ptr + o, mask=o < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _log_ratio(logp, old_ptr, o, end, of_segment, HAS_OLD: tl.constexpr, LEVEL: tl.constexpr):
    """(log-ratio, whether a gradient passes through it)."""
    if LEVEL == 0:
        old = logp
        if HAS_OLD:
            old = tl.load(old_ptr + o, mask=o < end, other=0.0)
        d = logp - old
    else:
        d = logp - logp + of_segment  # NaN where the log-prob is not finite
    if HAS_OLD or LEVEL == 0:
        inside = (d >= -_MOST) & (d <= _MOST)
        # with the comparisons in this order a NaN stays a NaN
        d = tl.where(d < -_MOST, -_MOST, tl.where(d > _MOST, _MOST, d))
    else:
        inside = o < end
    return d, inside


@triton.jit
def _sum_in_order(values_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, BLOCK):
        o = i + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + o, mask=o < count, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _policy_loss_fwd_kernel(
    logp_ptr,  # (N,) float32
    old_ptr,  # (N,) float32
    ref_ptr,  # (N,) float32
    entropy_ptr,  # (N,) float32
    advantage_ptr,  # (N,) float32
    scale_ptr,  # (N,) float32
    norm_ptr,  # () float32
    offsets_ptr,  # (U + 1,) int32
    loss_ptr,  # () float32
    partial_ptr,  # (programs,) float32
    coefs_ptr,  # (N,) float32, or (N, 5) with entropy
    arrived_ptr,  # one int32, zero before and after
    N: tl.int32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    o0: tl.float32,
    o1: tl.float32,
    o2: tl.float32,
    FORMULA: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_OLD: tl.constexpr,
    LEVEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,  # -1: no KL
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = tl.program_id(0)
    begin = u * BLOCK
    end = tl.minimum(begin + BLOCK, N)
    of_segment = 0.0
    power = 1.0  # d log-ratio / d logp
    if LEVEL > 0:
        begin = tl.load(offsets_ptr + u)
        end = tl.load(offsets_ptr + u + 1)
        count = tl.maximum(end - begin, 1).to(tl.float32)
        if LEVEL == 2:
            power = count
        if HAS_OLD:
            of_segment = _summed_log_ratio(logp_ptr, old_ptr, begin, end, BLOCK)
            if LEVEL == 1:
                of_segment = tl.div_rn(of_segment, count)
    norm = tl.load(norm_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(begin, end, BLOCK):
        o = n + tl.arange(0, BLOCK)
        inside_rows = o < end
        logp = tl.load(logp_ptr + o, mask=inside_rows, other=0.0)
        advantage = tl.load(advantage_ptr + o, mask=inside_rows, other=0.0)
        scale = tl.load(scale_ptr + o, mask=inside_rows, other=0.0)
        if HAS_RATIO:
            log_ratio, passes = _log_ratio(logp, old_ptr, o, end, of_segment, HAS_OLD, LEVEL)
            ratio = tl.exp(log_ratio)
            row, d_logp, d_ratio = _policy_formula(FORMULA, logp, ratio, advantage, o0, o1, o2)
            d = d_logp + tl.where(passes, d_ratio * ratio, 0.0) * power
        else:
            row, d, _ = _policy_formula(FORMULA, logp, 0.0, advantage, o0, o1, o2)
        if ESTIMATOR >= 0:
            kl, slope = _kl_estimate(ESTIMATOR, logp - tl.load(ref_ptr + o, mask=inside_rows, other=0.0))
            row += kl_coef * kl
            d += kl_coef * slope
        weight = scale * norm
        if HAS_ENTROPY:
            entropy = tl.load(entropy_ptr + o, mask=inside_rows, other=0.0)
            row -= entropy_coef * entropy
            log_p = entropy_coef * weight
            # g, constant, log_p, square and kappa of the row's gradient
            coef_ptr = coefs_ptr + o.to(tl.int64) * 5
            tl.store(coef_ptr, d * weight, mask=inside_rows)
            tl.store(coef_ptr + 1, log_p * entropy, mask=inside_rows)
            tl.store(coef_ptr + 2, log_p, mask=inside_rows)
            tl.store(coef_ptr + 3, tl.zeros([BLOCK], tl.float32), mask=inside_rows)
            tl.store(coef_ptr + 4, tl.zeros([BLOCK], tl.float32), mask=inside_rows)
        else:
            tl.store(coefs_ptr + o, d * weight, mask=inside_rows)
        total += tl.where(inside_rows, row * scale, 0.0)
    tl.store(partial_ptr + u, tl.sum(total, axis=0))

    # The last program to arrive sees every partial sum and adds them in order, so it does not matter which is last.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(loss_ptr, _sum_in_order(partial_ptr, tl.num_programs(0), BLOCK) * norm)
        tl.store(arrived_ptr, 0)


def policy_loss_fwd(given: PolicyLossArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (), and d loss / d logp (N,); with entropy the five numbers of each row's gradient (N, 5). All float32."""
    logps, offsets = given.logps, given.offsets
    N, device = logps.shape[0], logps.device
    programs = triton.cdiv(N, BLOCK) if offsets is None else offsets.shape[0] - 1
    wants_entropy = given.entropy is not None
    coefs = torch.empty((N, 5) if wants_entropy else N, dtype=torch.float32, device=device)
    if programs == 0:  # none would write the loss
        return torch.zeros((), dtype=torch.float32, device=device), coefs
    loss = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty(programs, dtype=torch.float32, device=device)
    # valid addresses, of the right types, for what the kernel is compiled not to read
    absent, no_offsets = partial, partial.view(torch.int32)
    o0, o1, o2 = [*given.options, *[0.0] * MOST_POLICY_OPTIONS][:MOST_POLICY_OPTIONS]
    level = TOKENS if offsets is None else MEAN if given.length_normalize else SUM
    old, ref, entropy = (absent if x is None else x for x in (given.old, given.ref, given.entropy))
    with on_device(logps):
        _policy_loss_fwd_kernel[(programs,)](
            logps, old, ref, entropy, given.advantage, given.scale, given.norm,
            no_offsets if offsets is None else offsets, loss, partial, coefs,
            arrival_counters(device), N, given.kl_coef, given.entropy_coef, o0, o1, o2,
            FORMULA=list(POLICY_FORMULAS).index(given.formula), HAS_RATIO=POLICY_FORMULAS[given.formula].has_ratio,
            HAS_OLD=given.old is not None, LEVEL=level,
            ESTIMATOR=list(KL_ESTIMATORS).index(given.kl_estimator) if given.kl_coef else -1,
            HAS_ENTROPY=wants_entropy, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return loss, coefs
