"""Generated from sspo_ext/heads.py by `python -m sspo_ext.backends.generate`. Do not edit."""
# ruff: noqa
import triton
import triton.language as tl


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _logsigmoid(x):
    e = tl.exp(-tl.abs(x))
    u = 1 + e
    # Kahan's log1p: what rounding lost in u, it lost in u - 1 too
    log1p = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))
    return tl.where(x > 0, 0.0, x) - log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _sigmoid_head(u_w, u_l, n_w, n_l, margin, label, beta):
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
def _hinge_head(u_w, u_l, n_w, n_l, margin, label, beta):
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
def _ipo_head(u_w, u_l, n_w, n_l, margin, label, beta):
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
def _simpo_head(u_w, u_l, n_w, n_l, margin, label, beta, simpo_gamma):
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
def _pair_head(HEAD: tl.constexpr, u_w, u_l, n_w, n_l, margin, label, o0, o1, o2, o3):
    if HEAD == 0:
        loss, du_w, du_l = _sigmoid_head(u_w, u_l, n_w, n_l, margin, label, o0)
    elif HEAD == 1:
        loss, du_w, du_l = _hinge_head(u_w, u_l, n_w, n_l, margin, label, o0)
    elif HEAD == 2:
        loss, du_w, du_l = _ipo_head(u_w, u_l, n_w, n_l, margin, label, o0)
    elif HEAD == 3:
        loss, du_w, du_l = _simpo_head(u_w, u_l, n_w, n_l, margin, label, o0, o1)
    return loss, du_w, du_l
