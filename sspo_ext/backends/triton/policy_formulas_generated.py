# SPDX-License-Identifier: Apache-2.0
"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""
# ruff: noqa
import triton
import triton.language as tl

from .formulas_generated import _expm1 as _expm1_below_0


@triton.jit
def _expm1(x):
    # far above 0 nothing of the 1 is left
    return tl.where(x > 20.0, tl.exp(x), _expm1_below_0(x))


@triton.jit
def _reinforce_formula(logp, ratio, advantage):
    # -A log pi
    mul = advantage * logp
    neg = -mul
    mul_1 = -advantage
    return neg, mul_1, 0.0


@triton.jit
def _ppo_formula(logp, ratio, advantage, epsilon, epsilon_high, delta):
    # -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    rsub = 1.0 - epsilon
    add = epsilon_high + 1.0
    clamp = tl.where((tl.where((ratio < rsub), rsub, ratio) > add), add, tl.where((ratio < rsub), rsub, ratio))
    clamp_1 = tl.where((ratio > delta), delta, ratio)
    mul = clamp_1 * advantage
    mul_1 = clamp * advantage
    minimum = tl.where((mul_1 == mul_1), tl.where((mul_1 < mul), mul_1, mul), mul_1)
    neg = -minimum
    eq = mul == mul_1
    where = tl.where(eq, -0.5, -1.0)
    lt = mul < mul_1
    masked_fill_ = tl.where(lt, 0.0, where)
    eq_1 = mul == mul_1
    where_1 = tl.where(eq_1, -0.5, -1.0)
    gt = mul > mul_1
    masked_fill__1 = tl.where(gt, 0.0, where_1)
    mul_2 = masked_fill_ * advantage
    mul_3 = masked_fill__1 * advantage
    le = ratio <= delta
    where_2 = tl.where(le, mul_3, 0.0)
    ge = ratio >= rsub
    le_1 = ratio <= add
    logical_and = ge & le_1
    where_3 = tl.where(logical_and, mul_2, 0.0)
    add_1 = where_2 + where_3
    return neg, 0.0, add_1


@triton.jit
def _cispo_formula(logp, ratio, advantage, epsilon_high):
    # -sg(min(r, epsilon_high)) A log pi
    clamp = tl.where((ratio > epsilon_high), epsilon_high, ratio)
    mul = clamp * advantage
    mul_1 = mul * logp
    neg = -mul_1
    mul_2 = -mul
    return neg, mul_2, 0.0


@triton.jit
def _policy_formula(FORMULA: tl.constexpr, logp, ratio, advantage, o0, o1, o2):
    if FORMULA == 0:
        loss, d_logp, d_ratio = _reinforce_formula(logp, ratio, advantage)
    elif FORMULA == 1:
        loss, d_logp, d_ratio = _ppo_formula(logp, ratio, advantage, o0, o1, o2)
    elif FORMULA == 2:
        loss, d_logp, d_ratio = _cispo_formula(logp, ratio, advantage, o0)
    return loss, d_logp, d_ratio


@triton.jit
def _k1(d):
    return d, 1.0


@triton.jit
def _k2(d):
    pow_1 = d * d
    mul = pow_1 * 0.5
    mul_2 = d * 2.0
    mul_3 = 0.5 * mul_2
    return mul, mul_3


@triton.jit
def _k3(d):
    neg = -d
    expm1 = _expm1(neg)
    add = expm1 + d
    add_1 = expm1 + 1.0
    neg_1 = -add_1
    add_2 = 1.0 + neg_1
    return add, add_2


@triton.jit
def _kl_estimate(ESTIMATOR: tl.constexpr, d):
    if ESTIMATOR == 0:
        value, slope = _k1(d)
    elif ESTIMATOR == 1:
        value, slope = _k2(d)
    elif ESTIMATOR == 2:
        value, slope = _k3(d)
    return value, slope
