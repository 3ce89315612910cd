# SPDX-License-Identifier: Apache-2.0
"""Triton's policy kernels, interpreted, against the torch definitions in float64; and both routes through the public
losses.

Shown to fail by breaking the kernels: a sum not divided by the length, a product's gradient as a mean's, a segment not
continued beyond its first block, the norm left out, entropy left out of its constant, the first program's loss alone,
uncounted rows kept (all test_formulas or test_constants); counters not reset (test_same_bits_...); gradients beyond the
range (test_log_ratios_beyond_the_range); -inf as 0, e^x overflowing (test_not_finite_as_in_torch); a part's segments
not moved (test_a_part_of_the_rows); the upstream gradient left out (test_public_loss).
"""

import importlib
import itertools
import math

import pytest
import torch
from helpers.linear import assert_linear_rule
from helpers.policy import AGGREGATIONS, VARIANTS, problem, with_old
from helpers.truth import assert_fp64_rule

from sspo_ext.formulas.policy import KL_ESTIMATORS, MAX_LOG_RATIO, POLICY_FORMULAS
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.objective.policy_arguments import PolicyOptions, policy_problem

# The package's attributes of these names are the launchers.
FILES = [
    importlib.import_module(f"sspo_ext.backends.triton.{name}") for name in ("policy_loss_fwd", "policy_constants")
]
SIZES = ((3, 0, 5), (1, 11), (0,), (7,))  # tokens of the steps of each sequence
FORMULAS = [
    ("reinforce", "token", True, {}),
    *(("ppo", level, mean, {"epsilon": 0.1, "delta": 1.3}) for level, mean in (("token", True), ("step", True),
      ("step", False), ("sequence", True), ("sequence", False))),
    *(("cispo", level, True, {"epsilon_high": 1.1}) for level in ("token", "step", "sequence")),
]  # fmt: skip


def steps_of(sizes):
    length = 1 + max(map(sum, sizes))
    ids = torch.full((len(sizes), length), -1)
    for b, counts in enumerate(sizes):
        ids[b, 1 : 1 + sum(counts)] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return StepLayout.from_step_ids(torch.zeros_like(ids), ids)


def options(name="ppo", level="token", mean=True, loss_options=None, **more):
    given = {"prob_threshold": None, "kl_coef": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0, "aggregation": "token",
             "num_items": None} | more  # fmt: skip
    return PolicyOptions(
        loss_type=name, importance_sampling_level=level, length_normalize=mean, loss_options=loss_options or {}, **given
    )


def both(steps, advantages, old, ref, given):
    """The problem for the kernels in float32, for plain torch in float64 and in float32."""

    def make(name, dtype):
        def cast(x):
            return x if x is None else x.to(dtype)

        return policy_problem(steps, dtype, name, cast(advantages), cast(old), cast(ref), given)

    return make("triton", torch.float32), make("reference", torch.float64), make("reference", torch.float32)


def by_autograd(made, logps, entropy):
    """(loss, d loss/d logp, d loss/d entropy)."""
    dtype = made.scale.dtype
    x, h = (None if t is None else t.to(dtype).requires_grad_() for t in (logps, entropy))
    loss = made.loss(x, h)
    gradients = torch.autograd.grad(loss, [t for t in (x, h) if t is not None], allow_unused=True)
    return loss.detach(), *(torch.zeros_like(x) if g is None else g for g in gradients)


def size_of_terms(made, logps, entropy):
    """What the loss's rounding is relative to: the sum of its terms' sizes."""
    x = logps.to(made.scale.dtype)
    rows = made.surrogate(x).abs()
    if made.kl_coef:
        rows = rows + made.kl_coef * made.kl(x).abs()
    if entropy is not None:
        rows = rows + made.entropy_coef * entropy.abs()
    return float((rows.detach() * made.scale.abs()).sum() * made.norm)


def check(steps, given, seed=0, old=True, logps=None, advantages=None):
    """The kernels' constants, loss and gradient against float64."""
    g = torch.Generator().manual_seed(seed)
    rows = steps.num_rows
    logps = -torch.rand(rows, generator=g) * 3 if logps is None else logps
    advantages = torch.randn(steps.num_steps, generator=g) if advantages is None else advantages
    near = logps + 0.2 * torch.randn(rows, generator=g)
    ref = logps + 0.3 * torch.randn(rows, generator=g)
    entropy = torch.rand(rows, generator=g) * 2 if given.entropy_coef else None
    needs_old = POLICY_FORMULAS[given.loss_type].has_ratio or given.prob_threshold is not None
    made, exact, by_torch = both(
        steps, advantages, near if old and needs_old else None, ref if given.kl_coef else None, given
    )
    for name in ("advantage", "scale", "norm"):
        assert torch.equal(getattr(made, name), getattr(by_torch, name)), name
    loss, coefs = made.evaluate(logps, entropy)
    truth, same = by_autograd(exact, logps, entropy), by_autograd(by_torch, logps, entropy)
    assert loss.dtype == coefs.dtype == torch.float32 and torch.isfinite(coefs).all()
    assert_fp64_rule(loss, same[0], truth[0], max(rows, 1), "loss", scale=size_of_terms(exact, logps, entropy))
    if not rows:
        return loss, coefs
    if entropy is None:
        assert_fp64_rule(coefs, same[1], truth[1], 8, "d loss/d logp")
        return loss, coefs
    assert_fp64_rule(coefs[:, 0].contiguous(), same[1], truth[1], 8, "d loss/d logp")
    assert_fp64_rule(-coefs[:, 2], same[2], truth[2], 8, "d loss/d entropy")
    assert torch.equal(coefs[:, 1], coefs[:, 2] * entropy) and not coefs[:, 3:].any()
    return loss, coefs


def set_block(monkeypatch, size):
    for file in FILES:
        monkeypatch.setattr(file, "BLOCK", size)


@pytest.mark.parametrize("estimator", [None, *KL_ESTIMATORS])
@pytest.mark.parametrize("name, level, mean, loss_options", FORMULAS)
def test_formulas(name, level, mean, loss_options, estimator, monkeypatch):
    """Every formula, level and estimator, with and without entropy and old log-probs, under every mean.

    Segments have several blocks, or blocks several segments.
    """
    kl = {} if estimator is None else {"kl_coef": 0.2, "kl_estimator": estimator}
    for i, (aggregation, entropy) in enumerate(itertools.product(AGGREGATIONS, (0.0, 0.3))):
        set_block(monkeypatch, 4 if i // 2 % 2 else 512)
        given = options(name, level, mean, loss_options, aggregation=aggregation, entropy_coef=entropy, **kl)
        check(steps_of(SIZES), given, seed=i, old=i % 3 > 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_constants(aggregation, weighted, monkeypatch):
    """Thresholds, numbers of items in every form, weights: the same bits as torch's."""
    steps = steps_of(SIZES)
    if weighted:
        steps = steps.with_row_weights(torch.rand(steps.num_rows) + 0.5)
    for threshold, items in itertools.product((None, 0.3, 1e-9), (None, 7, 0, torch.tensor(3), torch.tensor(0.0))):
        set_block(monkeypatch, 512 if items is None and threshold == 1e-9 else 4)
        check(steps, options(aggregation=aggregation, prob_threshold=threshold, num_items=items))


def test_advantages_of_steps_and_of_tokens():
    steps = steps_of(SIZES)
    of_rows = torch.randn(steps.num_rows)
    aligned = torch.zeros(steps.shape).flatten().index_copy(0, steps.rows + 1, of_rows).view(steps.shape)
    first, second = (check(steps, options(), advantages=a)[1] for a in (of_rows, aligned))
    assert torch.equal(first, second) and not torch.equal(first, check(steps, options())[1])


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
@pytest.mark.parametrize("sizes", [(), ((),), ((0, 0),), ((0, 1), ())], ids=str)
def test_nothing_or_little(sizes, level):
    """No sequence, no step, empty steps, one token."""
    if sizes and any(sizes):
        steps = steps_of(sizes) if all(sizes) else steps_of([s or (0,) for s in sizes])
    else:
        ids = torch.full((max(len(sizes), 1), 3), -1)
        steps = StepLayout.from_step_ids(torch.zeros_like(ids), ids)
    for aggregation in AGGREGATIONS:
        loss, _ = check(steps, options(level=level, aggregation=aggregation, kl_coef=0.1, entropy_coef=0.1))
        assert steps.num_rows or loss == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ratios_on_the_edges_of_the_clip(sign):
    """A ratio of exactly 1, with both ranges closed: minima tie and clamps meet their bounds."""
    steps = steps_of(SIZES)
    logps, advantages = -torch.rand(steps.num_rows), sign * torch.ones(steps.num_steps)
    for level in ("token", "step", "sequence"):
        for loss_options in ({"epsilon": 0.0}, {"epsilon": 0.25, "epsilon_high": 0.0}, {"epsilon": 0.0, "delta": 1.5}):
            _, coefs = check(
                steps, options("ppo", level, True, loss_options), old=False, logps=logps, advantages=advantages
            )
            assert coefs.abs().min() > 0, "at a bound the gradient passes"


def test_log_ratios_beyond_the_range():
    """They are held at the range, and no gradient passes."""
    steps = steps_of(((2, 2),))
    logps = torch.tensor([-1.0, -60.0, -30.0, -1.0])
    old = logps - torch.tensor([MAX_LOG_RATIO + 5, -MAX_LOG_RATIO - 5, 0.1, -0.1])
    for level in ("token", "step", "sequence"):
        made, exact, _ = both(steps, torch.tensor([-1.0, -1.0]), old, None, options("ppo", level, level == "token"))
        (loss, coefs), want = made.evaluate(logps, None), by_autograd(exact, logps, None)
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(coefs.double(), want[1], rtol=1e-5, atol=1e-12)
        if level == "token":
            assert coefs[0] == coefs[1] == 0 != coefs[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logps", "advantages", "old", "ref"])
@pytest.mark.parametrize("name, level, mean, loss_options", FORMULAS)
def test_not_finite_as_in_torch(name, level, mean, loss_options, where, bad):
    """NaN and infinities stand where plain torch has them, and nowhere else."""
    steps = steps_of(SIZES)
    given = options(name, level, mean, loss_options, kl_coef=0.1, aggregation="sequence")
    values = {"logps": -torch.rand(steps.num_rows), "advantages": torch.randn(steps.num_rows)}
    values |= {"old": values["logps"] - 0.1, "ref": values["logps"] + 0.1}
    values[where] = values[where].index_fill(0, torch.tensor([4]), bad)
    old = values["old"] if POLICY_FORMULAS[name].has_ratio else None
    made, _, by_torch = both(steps, values["advantages"], old, values["ref"], given)
    got, want = made.evaluate(values["logps"], None), by_autograd(by_torch, values["logps"], None)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_rows_that_do_not_count_give_nothing():
    """Whatever stands there: scale 0, finite terms."""
    steps = steps_of(SIZES)
    given = options(aggregation="step", prob_threshold=0.5, kl_coef=0.1, entropy_coef=0.1)
    old = torch.where(torch.arange(steps.num_rows) % 3 == 0, 0.0, -2.0)
    made, _, _ = both(steps, torch.ones(steps.num_steps), old, old, given)
    _, coefs = made.evaluate(old - 0.1, torch.ones_like(old))
    assert not coefs[::3].any() and (coefs[1::3, 0] != 0).all()


def test_same_bits_every_run_and_counters_left_at_zero(monkeypatch):
    counters = torch.zeros(2, dtype=torch.int32)
    for file in FILES:
        monkeypatch.setattr(file, "arrival_counters", lambda device: counters)
    steps = steps_of([(30, 700), (5, 9, 1)])
    given = options("ppo", "sequence", kl_coef=0.1, aggregation="step", prob_threshold=0.5)
    runs = [check(steps, given) for _ in range(2)]
    assert not counters.any()
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_a_part_of_the_rows():
    """What the linear route asks for: the coefficients of whole segments alone, bit for bit."""
    steps = steps_of(SIZES)
    for level, (start, end) in (("step", (3, 9)), ("sequence", (8, 20)), ("token", (2, 11))):
        logps = -torch.rand(steps.num_rows)
        made, _, _ = both(steps, torch.randn(steps.num_steps), logps - 0.1, logps, options("ppo", level, kl_coef=0.1))
        whole, part = made.evaluate(logps, None)[1], made.part(start, end).evaluate(logps[start:end], None)[1]
        assert torch.equal(part, whole[start:end])


def cast_all(values, dtype):
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in values.items()}


def public_options(variant, i, old, ref):
    given = with_old(VARIANTS[variant], old) | {
        "aggregation": AGGREGATIONS[i % 4], "kl_coef": 0.1 * (i % 3 > 0), "kl_estimator": f"k{i % 3 + 1}", "ref": ref,
        "entropy_coef": 0.05 * (i % 2),
    }  # fmt: skip
    return given | ({"prob_threshold": 0.1, "old": old} if i % 4 == 2 else {})


@pytest.mark.parametrize("i, variant", list(enumerate(VARIANTS)))
def test_public_loss(i, variant):
    """Through autograd, with a gradient that is not 1; in place or not."""
    batch, steps, advantages, old, ref = problem(seed=i, weighted=bool(i % 2), B=3, dtype=torch.float32)
    for j in (i, i + 1):
        given = {"advantages": advantages} | public_options(variant, j, old, ref)

        def run(dtype, given=given, **more):
            x = batch.logits.to(dtype, copy=True).requires_grad_()
            out = step_policy_loss(x * 1, steps, **cast_all(given, dtype), **more)
            (1.7 * out.loss).backward()
            return out, x.grad

        (exact, truth), (same, by_torch) = (run(d, backend="reference") for d in (torch.float64, torch.float32))
        out, gradient = run(torch.float32, backend="triton", inplace_backward=j == i)
        scale = size_of_terms(exact.problem, exact.tokens, exact.entropy)
        assert_fp64_rule(out.loss, same.loss.detach(), exact.loss.detach(), steps.num_rows, "loss", scale=scale)
        assert_fp64_rule(gradient, by_torch, truth, 8, "gradient")
        assert_fp64_rule(out.step_logps, same.step_logps, exact.step_logps, 8, "step log-probs")
        for name, value in same.metrics.items():
            torch.testing.assert_close(out.metrics[name], value, msg=name)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("i, variant", list(enumerate(VARIANTS)))
def test_linear_route(i, variant, trained):
    """One chunk, and chunks smaller than a segment: the gradient of the reference in float64. A sequence is idle."""
    _, steps, advantages, _, _ = problem(seed=i, weighted=bool(i % 2), B=3, dtype=torch.float32)
    hidden, weight = torch.randn(3, 14, 8), torch.randn(11, 8) * 0.5
    tokens = step_logps(hidden @ weight.T, steps, backend="reference").tokens
    given = public_options(variant, i, tokens + 0.2 * torch.randn_like(tokens), tokens + 0.3)
    given["advantages"] = advantages.masked_fill(steps.step_sequence == 0, 0)

    def run(dtype, name, **more):
        x, w = (t.to(dtype, copy=True) for t in (hidden, weight))
        x.requires_grad_()
        w.requires_grad_(trained)
        out = linear_step_policy_loss(x, w, steps, backend=name, **more, **cast_all(given, dtype))
        (1.7 * out.loss).backward()
        return [out.loss.detach(), out.step_logps, x.grad, *([w.grad] if trained else [])]

    exact, by_torch = (run(dtype, "reference") for dtype in (torch.float64, torch.float32))
    for more in ({"batch_invariant": True}, {"chunk_bytes": 11 * 4 * 5}):
        loss, *got = run(torch.float32, "triton", **more)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=2e-6)  # its terms cancel
        for j, g in enumerate(got, 1):
            assert_linear_rule(f"result {j}", g, by_torch[j], exact[j], torch.float32)


def test_second_derivative_is_refused():
    batch, steps, advantages, _, _ = problem(B=3, dtype=torch.float32)
    for entropy_coef in (0.0, 0.1):
        leaf = batch.logits.clone().requires_grad_()
        loss = step_policy_loss(leaf, steps, advantages, backend="triton", entropy_coef=entropy_coef).loss
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_gradient_waits_for_backward_in_float16():
    """The linear route's other way: the loss of log-probs, differentiated in backward."""
    _, steps, advantages, _, _ = problem(B=3, dtype=torch.float32)
    hidden, weight = torch.randn(3, 14, 8).half(), torch.randn(11, 8).half()

    def run(dtype, name, entropy_coef):
        x, w = hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
        out = linear_step_policy_loss(
            x, w, steps, advantages.to(torch.promote_types(dtype, torch.float32)), backend=name,
            loss_type="ppo", entropy_coef=entropy_coef,
        )  # fmt: skip
        (out.loss * 1.7).backward()
        return out.loss.detach().double(), x.grad.double(), w.grad.double()

    for entropy_coef in (0.0, 0.1):
        for g, w in zip(
            run(torch.float16, "triton", entropy_coef), run(torch.float64, "reference", entropy_coef), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=5e-3, atol=7e-4)
