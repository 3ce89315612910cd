# SPDX-License-Identifier: Apache-2.0
"""Pieces that heads share, in float32 against the same in Python's floats, each where its argument is hard; DiscoPOP.

Mutations of sspo_ext/formulas/numerics.py and of discopop, each caught by the test named (on a copy of the package).
35 were tried on test_formulas.py without its comparisons to generated code, which any change of a definition turns
red; 18 survived. Caught there, by test_golden and test_finite_far_out: logistic's labels swapped, one side alone, z for
-z, naive log sigmoid; log1p without its sign; log odds with a plus, with no clamp, clamped from below; bounded exp with
no bound, at 88.9, from below; DiscoPOP's sigmoid of the other sign, e^z, the product as printed, tau multiplying; a tau
of 1 refused (test_golden) and above 1 allowed (test_options). The others, here:
  log1mexp: branches swapped; log1p branch alone                test_log1mexp_keeps_its_digits
  log1mexp: expm1 branch alone                                  test_log1mexp_keeps_its_digits
  log1mexp: the log1p branch not guarded                        test_log1mexp_beyond_the_ends
  log odds: clamp at 1e-3, at 1e-9                              test_log_odds
  bounded exp: at 8, at 60                                      test_bounded_exp
  DiscoPOP: blend not scaled; logistic or exponential scaled    test_discopop_by_hand
  DiscoPOP: the exponential's weight not scaled                 test_discopop_by_hand
  DiscoPOP: tau of u, not of z; no margin; another default tau  test_discopop_by_hand
  DiscoPOP: a tau of 0 allowed                                  test_discopop_tau
Two remain, which change nothing that float32 shows: the branch at -ln 3, and no guard on log1mexp's expm1 branch.
"""

import math

import pytest
import torch

from sspo_ext.formulas.numerics import bounded_exp, log1mexp, log_odds, logistic
from sspo_ext.formulas.registry import PairScores, get_pair_formula

F32, F64 = torch.float32, torch.float64
# near 0, where 1 - e^m has no digits; around the branch at -ln 2; far out, where e^m is lost beside 1
MEANS = [-1e-6, -1e-5, -1e-3, -0.1, -0.6, -0.693, -0.694, -0.8, -3.0, -20.0, -40.0, -80.0]


def log1mexp_of(m):
    return math.log(-math.expm1(m)) if m > -math.log(2) else math.log1p(-math.exp(m))


def with_gradient(fn, values, dtype=F32):
    x = torch.tensor(values, dtype=dtype).requires_grad_()
    y = fn(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient, x.detach().double().tolist()


def close(found, want, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(found.double(), torch.tensor(want, dtype=F64), rtol=rtol, atol=atol)


def test_log1mexp_keeps_its_digits():
    y, gradient, means = with_gradient(log1mexp, MEANS)
    close(y, [log1mexp_of(m) for m in means])
    close(gradient, [-1 / math.expm1(-m) for m in means])


def test_log1mexp_beyond_the_ends():
    """Where e^m rounds to 1 and to 0, the branch not taken must not send a NaN back."""
    y, gradient, _ = with_gradient(log1mexp, [-1e-12, -1e-30, -1e4, -math.inf])
    close(y, [math.log(1e-12), math.log(1e-30), 0.0, 0.0])
    close(gradient, [-1e12, -1e30, 0.0, 0.0])


def test_log_odds():
    y, gradient, means = with_gradient(log_odds, [m for m in MEANS if m < -2e-6])
    close(y, [m - log1mexp_of(m) for m in means], rtol=2e-6, atol=1e-7)  # 0 where p is a half
    close(gradient, [1 + 1 / math.expm1(-m) for m in means], rtol=2e-6)
    # held below 1 by 1e-6: ln 1e6, and no gradient from there on
    y, gradient, _ = with_gradient(log_odds, [-2e-6, -9e-7, -1e-20, 0.0, 1e-3])
    close(y, [math.log(1 / 2e-6)] + [math.log(1e6)] * 4, rtol=1e-5)
    assert gradient[0] > 1e5 and gradient[1:].tolist() == [0.0] * 4


def test_bounded_exp():
    y, gradient, x = with_gradient(bounded_exp, [-200.0, -80.0, -1.0, 0.0, 79.0, 79.99])
    close(y[1:], [math.exp(v) for v in x[1:]], rtol=1e-5)
    assert y[0] == 0 and torch.equal(y, gradient)
    y, gradient, _ = with_gradient(bounded_exp, [80.5, 89.0, 1e4, math.inf])
    close(y, [math.exp(80)] * 4, rtol=1e-5)
    assert gradient.tolist() == [0.0] * 4
    assert (1e3 * y.sum()).isfinite()  # room for beta and a sum


def test_logistic():
    y, gradient, _ = with_gradient(lambda z: logistic(z, torch.tensor(0.75)), [0.0, 2.0, -1e4, 1e4])
    close(y, [math.log(2), math.log1p(math.exp(-2)) + 0.5, 7500.0, 2500.0])
    # sig(z) - label
    close(gradient, [-0.25, 1 / (1 + math.exp(-2)) - 0.75, -0.75, 0.25])


# ---- DiscoPOP, whose product of a sigmoid and an exponential is one exponent


def discopop(u_w, u_l, margin=0.0, dtype=F64, **options):
    head = get_pair_formula("discopop")
    values = head.check_options(options.pop("beta", head.options["beta"]), options)
    scores = PairScores(*(torch.tensor(v, dtype=dtype) for v in (u_w, u_l, 1.0, 1.0, margin, 1.0)))
    return head.fn(scores, **dict(zip(head.options, values, strict=True)))


def test_discopop_by_hand():
    """z and z / tau apart from each other and from 0, so that each place has its own."""
    # z = ln 2, z / tau = ln 4: sig = 4/5: 1/5 ln(1 + 1/2) + 4/5 * 1/2
    want = math.log(1.5) / 5 + 0.4
    one = {"beta": 1.0, "discopop_tau": 0.5}
    assert discopop(math.log(2), 0.0, **one).item() == pytest.approx(want, rel=1e-12)
    assert discopop(math.log(8), math.log(2), margin=math.log(2), **one).item() == pytest.approx(want, rel=1e-12)
    # beta 2: z = ln 4, z / tau = ln 16 ; z = -ln 2: 4/5 ln 3 + 1/5 * 2
    sixteen = math.log(1.25) / 17 + 16 / 17 / 4
    assert discopop(math.log(2), 0.0, **{**one, "beta": 2.0}).item() == pytest.approx(sixteen, rel=1e-12)
    assert discopop(0.0, math.log(2), **one).item() == pytest.approx(0.8 * math.log(3) + 0.4, rel=1e-12)
    # the defaults, beta 1/10 and tau 1/20: z / tau = ln 2 and z = ln 2 / 20
    z = math.log(2) / 20
    defaults = math.log1p(math.exp(-z)) / 3 + 2 / 3 * math.exp(-z)
    assert discopop(math.log(2) / 2, 0.0).item() == pytest.approx(defaults, rel=1e-12)


def test_discopop_far_below_is_its_logistic_part():
    """z = -100: e^100 overflows in float32 while sig(z / tau) e^-z is 0; with tau = 1 that product is 1."""
    assert discopop(-1000.0, 0.0, dtype=F32).item() == pytest.approx(100.0)
    assert discopop(-1000.0, 0.0, dtype=F32, discopop_tau=1.0).item() == pytest.approx(101.0)


def test_discopop_tau():
    check = get_pair_formula("discopop").check_options
    assert check(0.1, {"discopop_tau": 1}) == [0.1, 1.0] and check(0.1, {}) == [0.1, 0.05]
    for tau in (0, -0.1, 1.001):
        with pytest.raises(ValueError, match=r"discopop_tau: .*expects a number in \(0, 1\]"):
            check(0.1, {"discopop_tau": tau})
