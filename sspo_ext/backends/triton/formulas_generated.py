# SPDX-License-Identifier: Apache-2.0
"""Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit."""
# ruff: noqa
import triton
import triton.language as tl


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _log1p(x):
    # Kahan's: what rounding lost in u, it lost in u - 1 too
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _expm1(x):
    # Kahan's, for x <= 0, where e^x does not overflow
    u = tl.exp(x)
    y = u - 1
    small = (u == 1) | (y == -1)
    return tl.where(u == 1, x, tl.where(y == -1, -1.0, y * (x / tl.where(small, 1.0, tl.log(u)))))


@triton.jit
def _logsigmoid(x):
    return tl.where(x > 0, 0.0, x) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _sigmoid_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (u_w - u_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_1
    sub_2 = mul_1 - mul_2
    mul_3 = -rsub
    log_sigmoid_backward = (mul_3 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_1)))
    add = neg_3 + log_sigmoid_backward_1
    mul_5 = add * beta
    neg_4 = -mul_5
    return sub_2, mul_5, neg_4


@triton.jit
def _hinge_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # max(0, 1 - z),  z = beta (u_w - u_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    rsub = 1.0 - sub_1
    relu = _relu(rsub)
    threshold_backward = tl.where((relu <= 0.0), 0.0, 1.0)
    neg = -threshold_backward
    mul_1 = neg * beta
    neg_1 = -mul_1
    return relu, mul_1, neg_1


@triton.jit
def _ipo_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # (u_w / n_w - u_l / n_l - margin / beta - 1 / (2 beta))^2
    div = u_w / n_w
    div_1 = u_l / n_l
    sub = div - div_1
    div_2 = margin / beta
    sub_1 = sub - div_2
    mul = beta * 2.0
    reciprocal = 1.0 / mul
    sub_2 = sub_1 - reciprocal
    pow_1 = sub_2 * sub_2
    mul_2 = sub_2 * 2.0
    neg = -mul_2
    div_3 = neg / n_l
    div_4 = mul_2 / n_w
    return pow_1, div_4, div_3


@triton.jit
def _simpo_formula(u_w, u_l, n_w, n_l, margin, label, beta, simpo_gamma):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (S_w / n_w - S_l / n_l) - simpo_gamma - margin
    div = u_w / n_w
    div_1 = u_l / n_l
    sub = div - div_1
    mul = beta * sub
    sub_1 = mul - simpo_gamma
    sub_2 = sub_1 - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_2)
    mul_1 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_2
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_1
    sub_3 = mul_1 - mul_2
    mul_3 = -rsub
    log_sigmoid_backward = (mul_3 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_2)))
    add = neg_3 + log_sigmoid_backward_1
    mul_5 = add * beta
    neg_4 = -mul_5
    div_2 = neg_4 / n_l
    div_3 = mul_5 / n_w
    return sub_3, div_3, div_2


@triton.jit
def _ipo_sum_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # (u_w - u_l - margin / beta - 1 / (2 beta))^2
    sub = u_w - u_l
    div = margin / beta
    sub_1 = sub - div
    mul = beta * 2.0
    reciprocal = 1.0 / mul
    sub_2 = sub_1 - reciprocal
    pow_1 = sub_2 * sub_2
    mul_2 = sub_2 * 2.0
    neg = -mul_2
    return pow_1, mul_2, neg


@triton.jit
def _sigmoid_norm_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (u_w / n_w - u_l / n_l) - margin
    div = u_w / n_w
    div_1 = u_l / n_l
    sub = div - div_1
    mul = beta * sub
    sub_1 = mul - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_1
    sub_2 = mul_1 - mul_2
    mul_3 = -rsub
    log_sigmoid_backward = (mul_3 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_1)))
    add = neg_3 + log_sigmoid_backward_1
    mul_5 = add * beta
    neg_4 = -mul_5
    div_2 = neg_4 / n_l
    div_3 = mul_5 / n_w
    return sub_2, div_3, div_2


@triton.jit
def _robust_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # [-(1 - e) ls(z) + e ls(-z)] / (1 - 2 e),  e = label_smoothing,  z = beta (u_w - u_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_1
    add = mul_1 + mul_2
    mul_3 = label * 2.0
    sub_2 = mul_3 - 1.0
    div = add / sub_2
    div_1 = 1.0 / sub_2
    mul_4 = div_1 * rsub
    log_sigmoid_backward = (mul_4 * _sigmoid((-neg_1)))
    neg_2 = -log_sigmoid_backward
    mul_5 = div_1 * neg
    log_sigmoid_backward_1 = (mul_5 * _sigmoid((-sub_1)))
    add_1 = neg_2 + log_sigmoid_backward_1
    mul_6 = add_1 * beta
    neg_3 = -mul_6
    return div, mul_6, neg_3


@triton.jit
def _exo_pair_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # sig(z) [ls(z) - log q] + sig(-z) [ls(-z) - log(1 - q)],  q in [1e-6, 1 - 1e-6],  z = beta (u_w - u_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    clamp = tl.where((tl.where((label < 1e-06), 1e-06, label) > 0.999999), 0.999999, tl.where((label < 1e-06), 1e-06, label))
    sigmoid = _sigmoid(sub_1)
    log_sigmoid_forward = _logsigmoid(sub_1)
    log = tl.log(clamp)
    sub_2 = log_sigmoid_forward - log
    mul_1 = sigmoid * sub_2
    neg = -sub_1
    sigmoid_1 = _sigmoid(neg)
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    neg_2 = -clamp
    log1p = _log1p(neg_2)
    sub_3 = log_sigmoid_forward_1 - log1p
    mul_2 = sigmoid_1 * sub_3
    add = mul_1 + mul_2
    log_sigmoid_backward = (sigmoid_1 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    sigmoid_backward = (sub_3 * ((1.0 - sigmoid_1) * sigmoid_1))
    neg_4 = -sigmoid_backward
    add_1 = neg_3 + neg_4
    log_sigmoid_backward_1 = (sigmoid * _sigmoid((-sub_1)))
    add_2 = add_1 + log_sigmoid_backward_1
    sigmoid_backward_1 = (sub_2 * ((1.0 - sigmoid) * sigmoid))
    add_3 = add_2 + sigmoid_backward_1
    mul_7 = add_3 * beta
    neg_5 = -mul_7
    return add, mul_7, neg_5


@triton.jit
def _discopop_formula(u_w, u_l, n_w, n_l, margin, label, beta, discopop_tau):
    # -(1 - sig(z / tau)) ls(z) + e^(ls(z / tau) - z),  tau = discopop_tau,  z = beta (u_w - u_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    div = sub_1 / discopop_tau
    neg = -div
    sigmoid = _sigmoid(neg)
    neg_1 = -sigmoid
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg_1 * log_sigmoid_forward
    log_sigmoid_forward_1 = _logsigmoid(div)
    sub_2 = log_sigmoid_forward_1 - sub_1
    exp = tl.exp(sub_2)
    add = mul_1 + exp
    neg_2 = -exp
    log_sigmoid_backward = (exp * _sigmoid((-div)))
    log_sigmoid_backward_1 = (neg_1 * _sigmoid((-sub_1)))
    add_1 = neg_2 + log_sigmoid_backward_1
    neg_3 = -log_sigmoid_forward
    sigmoid_backward = (neg_3 * ((1.0 - sigmoid) * sigmoid))
    neg_4 = -sigmoid_backward
    add_2 = log_sigmoid_backward + neg_4
    div_1 = add_2 / discopop_tau
    add_3 = add_1 + div_1
    mul_5 = add_3 * beta
    neg_5 = -mul_5
    return add, mul_5, neg_5


@triton.jit
def _sigmoid_forward_kl_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (e^-u_l - e^-u_w) - margin,  exponents at most 80
    neg = -u_l
    clamp = tl.where((neg > 80.0), 80.0, neg)
    exp = tl.exp(clamp)
    neg_1 = -u_w
    clamp_1 = tl.where((neg_1 > 80.0), 80.0, neg_1)
    exp_1 = tl.exp(clamp_1)
    sub = exp - exp_1
    mul = beta * sub
    sub_1 = mul - margin
    neg_2 = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg_2 * log_sigmoid_forward
    rsub = 1.0 - label
    neg_3 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_3)
    mul_2 = rsub * log_sigmoid_forward_1
    sub_2 = mul_1 - mul_2
    mul_3 = -rsub
    log_sigmoid_backward = (mul_3 * _sigmoid((-neg_3)))
    neg_5 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg_2 * _sigmoid((-sub_1)))
    add = neg_5 + log_sigmoid_backward_1
    mul_5 = add * beta
    neg_6 = -mul_5
    mul_6 = neg_6 * exp_1
    le = neg_1 <= 80.0
    where = tl.where(le, mul_6, 0.0)
    neg_7 = -where
    mul_7 = mul_5 * exp
    le_1 = neg <= 80.0
    where_1 = tl.where(le_1, mul_7, 0.0)
    neg_8 = -where_1
    return sub_2, neg_7, neg_8


@triton.jit
def _sigmoid_js_divergence_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (ls(u_w) - ls(u_l)) - margin
    log_sigmoid_forward = _logsigmoid(u_w)
    log_sigmoid_forward_1 = _logsigmoid(u_l)
    sub = log_sigmoid_forward - log_sigmoid_forward_1
    mul = beta * sub
    sub_1 = mul - margin
    neg = -label
    log_sigmoid_forward_2 = _logsigmoid(sub_1)
    mul_1 = neg * log_sigmoid_forward_2
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_3 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_3
    sub_2 = mul_1 - mul_2
    mul_3 = -rsub
    log_sigmoid_backward = (mul_3 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_1)))
    add = neg_3 + log_sigmoid_backward_1
    mul_5 = add * beta
    neg_4 = -mul_5
    log_sigmoid_backward_2 = (neg_4 * _sigmoid((-u_l)))
    log_sigmoid_backward_3 = (mul_5 * _sigmoid((-u_w)))
    return sub_2, log_sigmoid_backward_3, log_sigmoid_backward_2


@triton.jit
def _sigmoid_alpha_divergence_formula(u_w, u_l, n_w, n_l, margin, label, beta, f_alpha_divergence_coef):
    # -q ls(z) - (1 - q) ls(-z),  z = beta (e^((a - 1) u_w) - e^((a - 1) u_l)) / (a - 1) - margin,  a = f_alpha_divergence_coef,  exponents at most 80
    sub = f_alpha_divergence_coef - 1.0
    mul = sub * u_w
    clamp = tl.where((mul > 80.0), 80.0, mul)
    exp = tl.exp(clamp)
    mul_1 = sub * u_l
    clamp_1 = tl.where((mul_1 > 80.0), 80.0, mul_1)
    exp_1 = tl.exp(clamp_1)
    sub_1 = exp - exp_1
    div = sub_1 / sub
    mul_2 = beta * div
    sub_2 = mul_2 - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_2)
    mul_3 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_2
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_4 = rsub * log_sigmoid_forward_1
    sub_3 = mul_3 - mul_4
    mul_5 = -rsub
    log_sigmoid_backward = (mul_5 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_2)))
    add = neg_3 + log_sigmoid_backward_1
    mul_7 = add * beta
    div_1 = mul_7 / sub
    neg_4 = -div_1
    mul_8 = neg_4 * exp_1
    le = mul_1 <= 80.0
    where = tl.where(le, mul_8, 0.0)
    mul_9 = where * sub
    mul_10 = div_1 * exp
    le_1 = mul <= 80.0
    where_1 = tl.where(le_1, mul_10, 0.0)
    mul_11 = where_1 * sub
    return sub_3, mul_11, mul_9


@triton.jit
def _flex_dpo_formula(u_w, u_l, n_w, n_l, margin, label, beta, beta_rejected):
    # -q ls(z) - (1 - q) ls(-z),  z = beta u_w - beta_rejected u_l - margin
    mul = beta * u_w
    mul_1 = beta_rejected * u_l
    sub = mul - mul_1
    sub_1 = sub - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_2 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_3 = rsub * log_sigmoid_forward_1
    sub_2 = mul_2 - mul_3
    mul_4 = -rsub
    log_sigmoid_backward = (mul_4 * _sigmoid((-neg_1)))
    neg_3 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_1)))
    add = neg_3 + log_sigmoid_backward_1
    neg_4 = -add
    mul_6 = neg_4 * beta_rejected
    mul_7 = add * beta
    return sub_2, mul_7, mul_6


@triton.jit
def _slic_formula(u_w, u_l, n_w, n_l, margin, label, beta, slic_delta):
    # max(0, slic_delta - beta (S_w - S_l) + margin)
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    sub_2 = slic_delta - sub_1
    relu = _relu(sub_2)
    threshold_backward = tl.where((relu <= 0.0), 0.0, 1.0)
    neg = -threshold_backward
    mul_1 = neg * beta
    neg_1 = -mul_1
    return relu, mul_1, neg_1


@triton.jit
def _nca_pair_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -ls(r_w) - ls(-r_w) / 2 - ls(-r_l) / 2,  r = beta u
    mul = beta * u_w
    mul_1 = beta * u_l
    log_sigmoid_forward = _logsigmoid(mul)
    neg = -log_sigmoid_forward
    neg_1 = -mul
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = log_sigmoid_forward_1 * 0.5
    sub = neg - mul_2
    neg_2 = -mul_1
    log_sigmoid_forward_2 = _logsigmoid(neg_2)
    mul_3 = log_sigmoid_forward_2 * 0.5
    sub_1 = sub - mul_3
    log_sigmoid_backward = (-0.5 * _sigmoid((-neg_2)))
    neg_4 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (-0.5 * _sigmoid((-neg_1)))
    neg_6 = -log_sigmoid_backward_1
    log_sigmoid_backward_2 = (-_sigmoid((-mul)))
    add = neg_6 + log_sigmoid_backward_2
    mul_6 = neg_4 * beta
    mul_7 = add * beta
    return sub_1, mul_7, mul_6


@triton.jit
def _bco_pair_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -ls(r_w - margin) - ls(margin - r_l),  r = beta u; margin is BCO's reward shift
    mul = beta * u_w
    sub = mul - margin
    log_sigmoid_forward = _logsigmoid(sub)
    neg = -log_sigmoid_forward
    mul_1 = beta * u_l
    sub_1 = margin - mul_1
    log_sigmoid_forward_1 = _logsigmoid(sub_1)
    sub_2 = neg - log_sigmoid_forward_1
    log_sigmoid_backward = (-_sigmoid((-sub_1)))
    neg_2 = -log_sigmoid_backward
    mul_2 = neg_2 * beta
    log_sigmoid_backward_1 = (-_sigmoid((-sub)))
    mul_3 = log_sigmoid_backward_1 * beta
    return sub_2, mul_3, mul_2


@triton.jit
def _sppo_hard_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2
    reciprocal = 1.0 / beta
    mul = reciprocal * 0.5
    sub = u_w - mul
    pow_1 = sub * sub
    reciprocal_1 = 1.0 / beta
    mul_1 = reciprocal_1 * 0.5
    add = u_l + mul_1
    pow_2 = add * add
    add_1 = pow_1 + pow_2
    mul_2 = add * 2.0
    mul_4 = sub * 2.0
    return add_1, mul_4, mul_2


@triton.jit
def _sppo_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # (u_w - (q - 1/2) / beta)^2 + (u_l + (q - 1/2) / beta)^2
    sub = label - 0.5
    div = sub / beta
    sub_1 = u_w - div
    pow_1 = sub_1 * sub_1
    add = u_l + div
    pow_2 = add * add
    add_1 = pow_1 + pow_2
    mul = add * 2.0
    mul_2 = sub_1 * 2.0
    return add_1, mul_2, mul


@triton.jit
def _apo_zero_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # 1 - sig(beta u_w) + sig(beta u_l)
    neg = -beta
    mul = neg * u_w
    sigmoid = _sigmoid(mul)
    mul_1 = beta * u_l
    sigmoid_1 = _sigmoid(mul_1)
    add = sigmoid + sigmoid_1
    sigmoid_backward = ((1.0 - sigmoid_1) * sigmoid_1)
    mul_2 = sigmoid_backward * beta
    sigmoid_backward_1 = ((1.0 - sigmoid) * sigmoid)
    mul_3 = sigmoid_backward_1 * neg
    return add, mul_3, mul_2


@triton.jit
def _apo_down_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # sig(beta u_w) + 1 - sig(z),  z = beta (u_w - u_l) - margin
    mul = beta * u_w
    sigmoid = _sigmoid(mul)
    sub = u_w - u_l
    mul_1 = beta * sub
    sub_1 = margin - mul_1
    sigmoid_1 = _sigmoid(sub_1)
    add = sigmoid + sigmoid_1
    sigmoid_backward = ((1.0 - sigmoid_1) * sigmoid_1)
    neg = -sigmoid_backward
    mul_2 = neg * beta
    neg_1 = -mul_2
    sigmoid_backward_1 = ((1.0 - sigmoid) * sigmoid)
    mul_3 = sigmoid_backward_1 * beta
    add_1 = mul_2 + mul_3
    return add, add_1, neg_1


@triton.jit
def _sft_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -S_w / nbar,  nbar = mean n_w over the batch's pairs: the mean over pairs is one over chosen tokens
    neg = -u_w
    div = neg / n_w
    div_1 = 1.0 / n_w
    neg_1 = -div_1
    return div, neg_1, 0.0


@triton.jit
def _nll_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -S_w / n_w
    neg = -u_w
    div = neg / n_w
    div_1 = 1.0 / n_w
    neg_1 = -div_1
    return div, neg_1, 0.0


@triton.jit
def _nll_rejected_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -S_l / n_l
    neg = -u_l
    div = neg / n_l
    div_1 = 1.0 / n_l
    neg_1 = -div_1
    return div, 0.0, neg_1


@triton.jit
def _cpo_formula(u_w, u_l, n_w, n_l, margin, label, beta, cpo_alpha):
    # -q ls(z) - (1 - q) ls(-z) - cpo_alpha S_w / n_w,  z = beta (S_w - S_l) - margin
    sub = u_w - u_l
    mul = beta * sub
    sub_1 = mul - margin
    neg = -label
    log_sigmoid_forward = _logsigmoid(sub_1)
    mul_1 = neg * log_sigmoid_forward
    rsub = 1.0 - label
    neg_1 = -sub_1
    log_sigmoid_forward_1 = _logsigmoid(neg_1)
    mul_2 = rsub * log_sigmoid_forward_1
    sub_2 = mul_1 - mul_2
    div = u_w / n_w
    mul_3 = cpo_alpha * div
    sub_3 = sub_2 - mul_3
    mul_4 = -cpo_alpha
    div_1 = mul_4 / n_w
    mul_5 = -rsub
    log_sigmoid_backward = (mul_5 * _sigmoid((-neg_1)))
    neg_4 = -log_sigmoid_backward
    log_sigmoid_backward_1 = (neg * _sigmoid((-sub_1)))
    add = neg_4 + log_sigmoid_backward_1
    mul_7 = add * beta
    neg_5 = -mul_7
    add_1 = div_1 + mul_7
    return sub_3, add_1, neg_5


@triton.jit
def _orpo_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -S_w / n_w - beta ls(lo_w - lo_l),  lo = m - log(1 - e^m),  m = min(S / n, -1e-6)
    neg = -u_w
    div = neg / n_w
    div_1 = u_w / n_w
    clamp = tl.where((div_1 > -1e-06), -1e-06, div_1)
    gt = clamp > -0.6931471805599453
    where = tl.where(gt, clamp, -1.0)
    where_1 = tl.where(gt, -1.0, clamp)
    expm1 = _expm1(where)
    neg_1 = -expm1
    log = tl.log(neg_1)
    exp = tl.exp(where_1)
    neg_2 = -exp
    log1p = _log1p(neg_2)
    where_2 = tl.where(gt, log, log1p)
    sub = clamp - where_2
    div_2 = u_l / n_l
    clamp_1 = tl.where((div_2 > -1e-06), -1e-06, div_2)
    gt_1 = clamp_1 > -0.6931471805599453
    where_3 = tl.where(gt_1, clamp_1, -1.0)
    where_4 = tl.where(gt_1, -1.0, clamp_1)
    expm1_1 = _expm1(where_3)
    neg_3 = -expm1_1
    log_1 = tl.log(neg_3)
    exp_1 = tl.exp(where_4)
    neg_4 = -exp_1
    log1p_1 = _log1p(neg_4)
    where_5 = tl.where(gt_1, log_1, log1p_1)
    sub_1 = clamp_1 - where_5
    sub_2 = sub - sub_1
    log_sigmoid_forward = _logsigmoid(sub_2)
    mul = beta * log_sigmoid_forward
    sub_3 = div - mul
    mul_1 = -beta
    log_sigmoid_backward = (mul_1 * _sigmoid((-sub_2)))
    neg_6 = -log_sigmoid_backward
    neg_7 = -neg_6
    where_6 = tl.where(gt_1, 0.0, neg_7)
    where_7 = tl.where(gt_1, neg_7, 0.0)
    add = neg_4 + 1.0
    div_3 = where_6 / add
    neg_8 = -div_3
    mul_2 = neg_8 * exp_1
    div_4 = where_7 / neg_3
    neg_9 = -div_4
    add_1 = expm1_1 + 1.0
    mul_3 = neg_9 * add_1
    where_8 = tl.where(gt_1, 0.0, mul_2)
    add_2 = neg_6 + where_8
    where_9 = tl.where(gt_1, mul_3, 0.0)
    add_3 = add_2 + where_9
    le = div_2 <= -1e-06
    where_10 = tl.where(le, add_3, 0.0)
    div_5 = where_10 / n_l
    neg_10 = -log_sigmoid_backward
    where_11 = tl.where(gt, 0.0, neg_10)
    where_12 = tl.where(gt, neg_10, 0.0)
    add_4 = neg_2 + 1.0
    div_6 = where_11 / add_4
    neg_11 = -div_6
    mul_4 = neg_11 * exp
    div_7 = where_12 / neg_1
    neg_12 = -div_7
    add_5 = expm1 + 1.0
    mul_5 = neg_12 * add_5
    where_13 = tl.where(gt, 0.0, mul_4)
    add_6 = log_sigmoid_backward + where_13
    where_14 = tl.where(gt, mul_5, 0.0)
    add_7 = add_6 + where_14
    le_1 = div_1 <= -1e-06
    where_15 = tl.where(le_1, add_7, 0.0)
    div_8 = where_15 / n_w
    div_9 = 1.0 / n_w
    neg_13 = -div_9
    add_8 = div_8 + neg_13
    return sub_3, add_8, div_5


@triton.jit
def _asft_formula(u_w, u_l, n_w, n_l, margin, label, beta):
    # -m_w + beta [-m_w - log(1 - e^m_l)],  m_w = S_w / n_w,  m_l = min(S_l / n_l, -1e-6)
    div = u_w / n_w
    div_1 = u_l / n_l
    clamp = tl.where((div_1 > -1e-06), -1e-06, div_1)
    neg = -div
    neg_1 = -div
    gt = clamp > -0.6931471805599453
    where = tl.where(gt, clamp, -1.0)
    where_1 = tl.where(gt, -1.0, clamp)
    expm1 = _expm1(where)
    neg_2 = -expm1
    log = tl.log(neg_2)
    exp = tl.exp(where_1)
    neg_3 = -exp
    log1p = _log1p(neg_3)
    where_2 = tl.where(gt, log, log1p)
    sub = neg_1 - where_2
    mul = beta * sub
    add = neg + mul
    neg_4 = -beta
    where_3 = tl.where(gt, 0.0, neg_4)
    where_4 = tl.where(gt, neg_4, 0.0)
    add_1 = neg_3 + 1.0
    div_2 = where_3 / add_1
    neg_5 = -div_2
    mul_2 = neg_5 * exp
    div_3 = where_4 / neg_2
    neg_6 = -div_3
    add_2 = expm1 + 1.0
    mul_3 = neg_6 * add_2
    where_5 = tl.where(gt, 0.0, mul_2)
    where_6 = tl.where(gt, mul_3, 0.0)
    add_3 = where_5 + where_6
    neg_7 = -beta
    add_4 = neg_7 + -1.0
    le = div_1 <= -1e-06
    where_7 = tl.where(le, add_3, 0.0)
    div_4 = where_7 / n_l
    div_5 = add_4 / n_w
    return add, div_5, div_4


@triton.jit
def _pair_formula(FORMULA: tl.constexpr, u_w, u_l, n_w, n_l, margin, label, o0, o1, o2, o3):
    if FORMULA == 0:
        loss, du_w, du_l = _sigmoid_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 1:
        loss, du_w, du_l = _hinge_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 2:
        loss, du_w, du_l = _ipo_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 3:
        loss, du_w, du_l = _simpo_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 4:
        loss, du_w, du_l = _ipo_sum_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 5:
        loss, du_w, du_l = _sigmoid_norm_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 6:
        loss, du_w, du_l = _robust_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 7:
        loss, du_w, du_l = _exo_pair_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 8:
        loss, du_w, du_l = _discopop_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 9:
        loss, du_w, du_l = _sigmoid_forward_kl_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 10:
        loss, du_w, du_l = _sigmoid_js_divergence_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 11:
        loss, du_w, du_l = _sigmoid_alpha_divergence_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 12:
        loss, du_w, du_l = _flex_dpo_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 13:
        loss, du_w, du_l = _slic_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 14:
        loss, du_w, du_l = _nca_pair_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 15:
        loss, du_w, du_l = _bco_pair_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 16:
        loss, du_w, du_l = _sppo_hard_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 17:
        loss, du_w, du_l = _sppo_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 18:
        loss, du_w, du_l = _apo_zero_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 19:
        loss, du_w, du_l = _apo_down_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 20:
        loss, du_w, du_l = _sft_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 21:
        loss, du_w, du_l = _nll_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 22:
        loss, du_w, du_l = _nll_rejected_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 23:
        loss, du_w, du_l = _cpo_formula(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    elif FORMULA == 24:
        loss, du_w, du_l = _orpo_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    elif FORMULA == 25:
        loss, du_w, du_l = _asft_formula(u_w, u_l, n_w, n_l, margin, label, o0)
    return loss, du_w, du_l
