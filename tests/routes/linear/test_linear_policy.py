# SPDX-License-Identifier: Apache-2.0
"""Policy losses on the linear route: equal to the logits route, at the FLOPs of the schedule; and the dual numbers that
differentiate a definition inside its op.

Mutations of sspo_ext/{linear_policy,dual}.py, each caught by the test named:
  a group's rows keep the batch's segment numbers            test_equals_the_logits_route[gspo-all]
  gradient of the entropy with the other sign                test_equals_the_logits_route[ppo-all]
  the tokens' scale forgotten                                test_equals_the_logits_route[reinforce-all]
  float16 divides before the loss scale                      test_float16_gradients_wait_for_the_loss_scale
  float16 gradients kept from forward                        test_float16_sums_over_many_tokens
  recompute looks at the last chunk again                    test_gemms_of_the_schedule
  groups one row larger than a chunk                         test_gemms_of_the_schedule
  a frozen head with an entropy bonus in backward            test_gemms_of_the_schedule
  no slope at a clamp's bounds; one side's slope at a tie    test_dual_rules
"""

import pytest
import torch
from helpers.batch import random_batch
from helpers.linear import GRADIENTS, assert_linear_rule, collect, gemm_flops, layout_of_lengths
from helpers.linear import problem as linear_problem
from helpers.opcheck import opcheck
from helpers.policy import AGGREGATIONS, VARIANTS, with_old
from torch._dynamo.testing import CompileCounterWithBackend

from sspo_ext.formulas.dual import Dual
from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.routes.linear import policy as linear_policy
from sspo_ext.routes.linear.plan import policy_plan

F64 = torch.float64
V, H = 53, 17


def near(tokens, size, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tokens + torch.randn(tokens.shape, generator=g, dtype=F64).to(tokens.dtype) * size


def batch(seed=0, B=4, T=14, dtype=F64, weighted=False):
    """layout, hidden states and head, advantages (S,), old and reference log-probs (N,)."""
    layout = random_batch(seed, B, T, V, weighted=weighted).layout
    p = linear_problem((B, T), V, H, seed=seed, hidden_dtype=dtype, weight_dtype=dtype)
    logits = torch.nn.functional.linear(p.hidden.double(), p.weight.double(), p.bias.double())
    tokens = step_logps(logits, layout, backend="reference").tokens
    g = torch.Generator().manual_seed(seed)
    return layout, p, torch.randn(layout.num_steps, generator=g, dtype=F64), near(tokens, 0.2), near(tokens, 0.3)


def logits_route(p, layout, advantages, needs=(1, 1, 1), dtype=F64, upstream=1.0, **options):
    """Plain torch in `dtype`, on whole logits."""
    leaves = p.leaves(needs)
    hidden, weight, bias = (t.to(dtype) for t in leaves)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    loss = step_policy_loss(logits, layout, advantages, backend="reference", **options).loss
    return collect(loss, leaves, upstream)


def linear_route(p, layout, advantages, needs=(1, 1, 1), upstream=1.0, **options):
    leaves = p.leaves(needs)
    loss = linear_step_policy_loss(*leaves[:2], layout, advantages, bias=leaves[2], **options).loss
    return collect(loss, leaves, upstream)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradients", ["hidden", "weight", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_logits_route(variant, gradients):
    """With chunks of one row, of a few, and of all; every aggregation, KL and entropy term, and token weights."""
    needs = GRADIENTS[gradients]
    for i, aggregation in enumerate(AGGREGATIONS):
        layout, p, advantages, old, ref = batch(seed=i, weighted=i % 2 == 0)
        options = with_old(VARIANTS[variant], old) | {
            "aggregation": aggregation, "ref": ref, "kl_coef": 0.2, "entropy_coef": 0.1 * (i // 2), "upstream": -1.5,
        }  # fmt: skip
        want = logits_route(p, layout, advantages, needs, **options)
        for rows in (1, 6, 1000):
            assert_same(linear_route(p, layout, advantages, needs, chunk_bytes=rows * V * 8, **options), want)


def test_outputs_are_those_of_the_logits_route():
    layout, p, advantages, old, ref = batch(weighted=True)
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    options = {"old": old, "ref": ref, "kl_coef": 0.1, "loss_type": "ppo", "entropy_coef": 0.1}
    want = step_policy_loss(logits, layout, advantages, **options)
    for needs in [(0, 0, 0), (1, 0, 0), (1, 1, 1)]:
        leaves = p.leaves(needs)
        got = linear_step_policy_loss(*leaves[:2], layout, advantages, bias=leaves[2], **options)
        for name in ("tokens", "step_logps", "entropy"):
            assert not getattr(got, name).requires_grad
            torch.testing.assert_close(getattr(got, name), getattr(want, name))
        assert set(got.metrics) == set(want.metrics)
        for name, value in want.metrics.items():
            torch.testing.assert_close(got.metrics[name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", ["hidden", "all"])
@pytest.mark.parametrize("variant", ["reinforce", "ppo", "gspo"])
def test_dtypes(variant, gradients, dtype):
    layout, p, advantages, old, ref = batch(dtype=dtype)
    options = with_old(VARIANTS[variant], old) | {"ref": ref, "kl_coef": 0.1}
    if variant != "reinforce":
        # far from a corner, where rounding alone would change a token's gradient
        options |= {"epsilon": 0.9, "epsilon_high": 5.0}
    exact = type(p)(p.hidden.double(), p.weight.double(), p.bias.double())
    needs = GRADIENTS[gradients]
    truth = logits_route(exact, layout, advantages, needs, **options)
    torchs = logits_route(p, layout, advantages, needs, dtype=dtype, **options)
    got = linear_route(p, layout, advantages, needs, chunk_bytes=7 * V * dtype.itemsize, **options)
    for name, mine, theirs, true in zip(("loss", "hidden", "weight", "bias"), got, torchs, truth, strict=True):
        if true is not None:
            assert_linear_rule(name, mine, theirs, true, dtype)


def test_float16_gradients_wait_for_the_loss_scale():
    """A mean over very many tokens: the gradient of one would vanish in float16 before the caller's scale."""
    layout, p, advantages, old, _ = batch(dtype=torch.float16)
    options = {"old": old, "loss_type": "ppo", "num_items": 2e6}
    got = linear_route(p, layout, advantages, upstream=65536.0, **options)
    exact = type(p)(p.hidden.double(), p.weight.double(), p.bias.double())
    want = logits_route(exact, layout, advantages, upstream=65536.0, **options)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10])
def test_float16_sums_over_many_tokens(scale, entropy_coef):
    """8192 tokens, a frequent one among them, a large hidden dimension: their sum does not fit, their mean does."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 32, (8, 1025), generator=g)
    labels[torch.rand(8, 1025, generator=g) < 0.3] = 5
    layout = StepLayout.from_step_ids(labels, torch.zeros_like(labels))
    hidden, weight = torch.randn(8, 1025, 16, generator=g) * 0.3, torch.randn(32, 16, generator=g) * 0.05
    hidden[..., 0], weight[:, 0] = 30.0, weight[:, 0] * 0.01
    advantages, options = torch.full((8,), 2.0), {"entropy_coef": entropy_coef}

    def gradient(linear):
        head = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            if linear:
                loss = linear_step_policy_loss(hidden, head, layout, advantages, **options).loss
            else:
                logits = torch.nn.functional.linear(hidden, head)
                loss = step_policy_loss(logits, layout, advantages, **options).loss
        (loss * scale).backward()
        return head.grad / scale

    exact = weight.double().requires_grad_()
    logits = torch.nn.functional.linear(hidden.double(), exact)
    step_policy_loss(logits, layout, advantages.double(), **options).loss.backward()
    got, want, truth = gradient(True), gradient(False), exact.grad
    assert want.isfinite().all() and want.abs().max() > 10
    # of a token's share, 2 / 8192 of the scale, float16 keeps few digits: both routes
    assert (got - truth).abs().max() <= 2 * (want - truth).abs().max()


def test_weight_grad_buffer():
    layout, p, advantages, old, _ = batch()
    want = linear_route(p, layout, advantages, old=old, loss_type="ppo")
    hidden, weight, bias = p.leaves()
    buffer = torch.ones_like(weight)
    linear_step_policy_loss(
        hidden, weight, layout, advantages, bias=bias, old=old, loss_type="ppo", weight_grad=buffer
    ).loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(buffer, want[2] + 1)
    torch.testing.assert_close(hidden.grad, want[1])


@pytest.mark.parametrize("sequences", [2, 0])
@pytest.mark.parametrize("variant", ["reinforce", "gspo", "gspo steps"])
def test_nothing_to_score(variant, sequences):
    shape, gspo_steps = (sequences, 4), {**VARIANTS["gspo"], "importance_sampling_level": "step"}
    layout = StepLayout.from_step_ids(torch.full(shape, -100), torch.full(shape, -1))
    p = linear_problem(shape, V, H)
    none = torch.zeros(0)
    options = with_old(gspo_steps if variant == "gspo steps" else VARIANTS[variant], none)
    for entropy_coef in (0.0, 0.1):
        loss, *gradients = linear_route(p, layout, none, ref=none, kl_coef=0.1, entropy_coef=entropy_coef, **options)
        assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_double_backward_is_refused():
    layout, p, advantages, _, _ = batch()
    leaves = p.leaves()
    loss = linear_step_policy_loss(*leaves[:2], layout, advantages, bias=leaves[2]).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_same_bits_again():
    layout, p, advantages, old, _ = batch(dtype=torch.float32)
    options = {"old": old, "loss_type": "ppo", "importance_sampling_level": "sequence", "chunk_bytes": 9 * V * 4}
    first, second = (linear_route(p, layout, advantages, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_errors():
    layout, p, advantages, _, _ = batch()
    with pytest.raises(TypeError, match="layout: expected a StepLayout"):
        linear_step_policy_loss(p.hidden, p.weight, torch.zeros(4, 14), advantages)
    with pytest.raises(TypeError, match="epsilon: neither a common option"):
        linear_step_policy_loss(p.hidden, p.weight, layout, advantages, epsilon=0.2)
    with pytest.raises(ValueError, match="advantages: expected"):
        linear_step_policy_loss(p.hidden, p.weight, layout, advantages[:1])


# ---- the schedule

# step lengths of one sequence, rows a chunk, level
CASES = {
    "tokens": ([12, 15, 4], 8, "token"),
    "one-row chunks": ([3, 4], 1, "token"),
    "steps fit": ([6, 2, 0, 3, 5, 1], 7, "step"),
    "a large step": ([2, 9, 0, 3, 16], 7, "step"),
    "a sequence fits": ([6, 3, 5], 14, "sequence"),
    "a large sequence": ([6, 3, 6], 7, "sequence"),
}


def run(case, needs, entropy_coef=0.0, grad_mode=True):
    lengths, rows, level = CASES[case]
    layout = layout_of_lengths(lengths, V)
    leaves = linear_problem((1, layout.shape[1]), V, H).leaves(needs)
    chunk_bytes = rows * V * 4
    options = {"loss_type": "ppo", "importance_sampling_level": level, "old": torch.zeros(layout.num_rows)}

    def step():
        with torch.set_grad_enabled(grad_mode):
            loss = linear_step_policy_loss(
                *leaves[:2], layout, torch.randn(layout.num_steps),
                bias=leaves[2], chunk_bytes=chunk_bytes, entropy_coef=entropy_coef, **options,
            ).loss  # fmt: skip
            if loss.requires_grad:
                loss.backward()

    plan = policy_plan(
        layout, importance_sampling_level=level, vocab=V, hidden=H, chunk_bytes=chunk_bytes,
        hidden_gradient=bool(needs[0]), weight_gradient=bool(needs[1]), bias_gradient=bool(needs[2]),
    )  # fmt: skip
    return gemm_flops(step), plan, 2 * layout.num_rows * H * V


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    "needs, gemms",
    [((0, 0, 0), 1), ((1, 0, 0), 2), ((0, 1, 0), 2), ((1, 1, 0), 3), ((1, 1, 1), 3), ((0, 0, 1), 1), ((1, 0, 1), 2)],
)
def test_gemms_of_the_schedule(case, needs, gemms, entropy_coef):
    """1 without gradients, 2 with a frozen head, 3 with a trained one, entropy bonus or not; a second look only at the
    rows of a unit above the budget."""
    ran, plan, one = run(case, needs, entropy_coef)
    frozen = needs == (1, 0, 0) and not entropy_coef
    if "large" in case and any(needs) and not frozen:
        assert gemms * one < ran < (gemms + 1) * one and ran == plan.flops
    else:
        assert ran == gemms * one
        assert frozen or ran == plan.flops, plan
    assert plan.chunk_rows >= max(end - start for group in plan.groups for start, end in group.chunks)


def test_evaluation_of_a_trained_model_is_one_gemm():
    ran, _, one = run("steps fit", (1, 1, 1), grad_mode=False)
    assert ran == one


def test_groups_cover_the_rows_in_order():
    for case in CASES:
        _, plan, _ = run(case, (1, 1, 0))
        spans = [span for group in plan.groups for span in group.chunks]
        assert [s for s, _ in spans] == [0, *[e for _, e in spans[:-1]]] and spans[-1][1] == plan.num_rows


# ---- torch.compile


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("needs", [(1, 0, 0), (1, 1, 1), (0, 1, 0)])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(monkeypatch, needs, entropy_coef, dtype):
    """With the very arguments that the public function passes."""
    if needs == (1, 0, 0) and not entropy_coef:
        needs = (1, 0, 1)
    calls = []
    real = linear_policy.linear_policy_fwd
    monkeypatch.setattr(linear_policy, "linear_policy_fwd", lambda *args: (calls.append(args), real(*args))[1])
    layout, p, advantages, old, _ = batch(dtype=dtype)
    level = "step" if needs[2] else "token"
    linear_route(
        p, layout, advantages, needs, old=old, loss_type="ppo", importance_sampling_level=level,
        entropy_coef=entropy_coef, chunk_bytes=5 * V * dtype.itemsize,
    )  # fmt: skip
    (args,) = calls
    opcheck(real, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), dtype)


@pytest.mark.parametrize(
    "route, variant",
    [
        ("linear", "gspo"),
        pytest.param("linear", "ppo", marks=pytest.mark.slow),
        pytest.param("logits", "gspo", marks=pytest.mark.slow),
    ],
)
def test_fullgraph_equals_eager(fresh, route, variant):
    """Two graphs for all shapes; what the op differentiates below autograd's keys is right."""
    options = VARIANTS[variant] | {"aggregation": "sequence", "kl_coef": 0.1, "entropy_coef": 0.1 * (variant == "gspo")}

    def fn(hidden, weight, bias, layout, advantages, old, ref):
        mine = {**with_old(options, old), "ref": ref}
        if route == "linear":
            out = linear_step_policy_loss(hidden, weight, layout, advantages, bias=bias, chunk_bytes=9 * V * 4, **mine)
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            out = step_policy_loss(logits, layout, advantages, **mine)
        return out.loss, out.metrics["policy_loss"], out.step_logps

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    for seed, (B, T) in enumerate([(4, 14), (6, 23), (3, 31)]):
        layout, p, advantages, old, ref = batch(seed, B, T, dtype=torch.float32)
        results = []
        for f in (fn, compiled):
            leaves = p.leaves()
            out = f(*leaves, layout, advantages, old, ref)
            results.append([*(t.detach() for t in out), *collect(out[0], leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


# ---- dual numbers


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("importance_sampling_level") is None])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_dual_numbers_equal_autograd(variant, estimator):
    """At corners too: ratios of exactly 1 - epsilon, 1 + epsilon and 1, and advantages of 0."""
    layout, p, advantages, old, ref = batch(T=40)
    layout = layout_of_lengths([layout.num_rows], V)
    tokens = near(old, 0.3, seed=3)
    advantages = near(torch.zeros_like(tokens), 1.0)
    advantages[::7] = 0
    options = VARIANTS[variant]
    head = POLICY_FORMULAS[options["loss_type"]]
    tokens[:4] = old[:4] + torch.tensor([0.8, 1.2, 1.0, 0.9], dtype=F64).log()
    scored = torch.zeros(1, layout.shape[1], V, dtype=F64)
    out = step_policy_loss(
        scored, layout, advantages, ref=ref, kl_coef=0.3, kl_estimator=estimator, **with_old(options, old)
    )
    leaf = tokens.clone().requires_grad_()
    (want,) = torch.autograd.grad(out.problem.rows(leaf).sum(), leaf)
    dual = out.problem.rows(Dual.variable(tokens))
    torch.testing.assert_close(dual.slope, want)
    torch.testing.assert_close(dual.value, out.problem.rows(tokens))
    assert head.name == options["loss_type"]


def test_dual_numbers_refuse_what_they_do_not_know():
    with pytest.raises(NotImplementedError, match="add its rule to dual.py"):
        torch.sin(Dual.variable(torch.ones(2)))


RULES = (
    torch.exp, torch.expm1, torch.square, lambda x: torch.clamp(x, -0.4, 0.4), lambda x: 3 - x, lambda x: -x + 2,
    lambda x: torch.ones(5, dtype=F64) - x * x, lambda x: torch.minimum(x, 0.3 * x),
    lambda x: torch.full((5,), 2.0, dtype=F64) * x,
)  # fmt: skip


def test_dual_clamp_at_its_bounds():
    """The slope is that of the inside, whatever torch gives there: it changed in 2.14."""
    x = torch.tensor([-0.6, -0.5, 0.5, 0.6], dtype=F64)
    assert torch.clamp(Dual.variable(x), -0.5, 0.5).slope.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("fn", RULES)
def test_dual_rules(fn):
    x = torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5], dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(fn(x).sum(), x)
    torch.testing.assert_close(fn(Dual.variable(x.detach())).slope, want)
