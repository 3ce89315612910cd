# SPDX-License-Identifier: Apache-2.0
"""Rows whose advantage is 0, on the linear route: gradients as with them, at the products of the plan.

Shown to fail, each by the test named:
  rows of a busy unit left out                     test_gradients_are_those_of_all_rows
  the old log-probs of the others kept             test_gradients_are_those_of_all_rows
  idle rows by advantage, with a KL term           test_kl_and_entropy_move_every_row
  log-probs of forward-only rows left out          test_outputs_of_rows_that_are_not_skipped
  the loss without a bad value of an idle row      test_a_bad_value_shows_unless_it_is_skipped
  NaN in the means of metrics                      test_metrics_are_over_the_rows_that_are_there
  the mask read from advantages on a device        test_on_a_device_nothing_waits
"""

import functools

import pytest
import torch
from helpers.linear import GRADIENTS, collect, gemm_flops
from helpers.linear import problem as linear_problem
from helpers.policy import AGGREGATIONS, VARIANTS, with_old

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.routes.linear.plan import policy_plan

F64 = torch.float64
V, H, B, T = 53, 17, 4, 14


def batch(dtype=F64):
    """Steps of three tokens, two of four sequences and some steps of the others with advantages of 0."""
    ids = torch.full((B, T), -1)
    ids[:, 2:] = torch.arange(T - 2) // 3
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[3, 5:] = -100  # steps without a token
    layout = StepLayout.from_step_ids(labels, ids)
    p = linear_problem((B, T), V, H, hidden_dtype=dtype, weight_dtype=dtype)
    tokens = step_logps(
        torch.nn.functional.linear(p.hidden.double(), p.weight.double(), p.bias.double()), layout, backend="reference"
    ).tokens
    old = tokens + 0.2 * torch.randn(tokens.shape, generator=g, dtype=F64)
    advantages = torch.randn(layout.num_steps, generator=g, dtype=F64)
    advantages[:4], advantages[5], advantages[9] = 0, -0.0, 0
    return layout, p, advantages, old


def forms(layout, advantages):
    """The same advantages for each step, for each row, and aligned with the labels."""
    rows = advantages[layout.step_of_row]
    aligned = torch.full(layout.shape, 7.0, dtype=advantages.dtype)
    aligned.view(-1)[layout.rows + 1] = rows
    return {"steps": advantages, "rows": rows, "tokens": aligned}


def expected_idle(layout, advantages, level):
    zero = advantages[layout.step_of_row] == 0
    if level == "sequence":
        sequence = layout.step_sequence.long()[layout.step_of_row]
        busy = torch.zeros(layout.num_sequences).index_add(0, sequence, (~zero).float()) > 0
        return ~busy[sequence]
    return zero


def run(p, layout, advantages, needs=(1, 1, 1), **options):
    leaves = p.leaves(needs)
    out = linear_step_policy_loss(*leaves[:2], layout, advantages, bias=leaves[2], **options)
    return out, collect(out.loss, leaves, -1.5)


@pytest.mark.parametrize("gradients", ["hidden", "weight", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_all_rows(variant, gradients, backend):
    layout, p, advantages, old = batch()
    needs = GRADIENTS[gradients]
    level = VARIANTS[variant].get("importance_sampling_level", "token")
    idle = expected_idle(layout, advantages, level)
    assert idle.any() and not idle.all()
    given_as = forms(layout, advantages)
    for aggregation, form in zip(AGGREGATIONS, (*given_as, "steps"), strict=True):
        given = given_as[form]
        options = with_old(VARIANTS[variant], old) | {"aggregation": aggregation}
        leaves = p.leaves(needs)
        logits = torch.nn.functional.linear(*leaves)
        want = collect(step_policy_loss(logits, layout, given, backend="reference", **options).loss, leaves, -1.5)
        for rows, name in ((1, backend), (7, backend), (1000, backend), (7, "reference")):
            for skip in (False, True):
                out, got = run(
                    p, layout, given, needs, chunk_bytes=rows * V * 8, backend=name,
                    skip_zero_advantages=skip, **options,
                )  # fmt: skip
                for a, b in zip(got, want, strict=True):
                    if b is not None:
                        torch.testing.assert_close(a, b, msg=f"{form} {rows} {skip}")
                assert torch.equal(out.tokens.isnan(), idle & skip)


def test_outputs_of_rows_that_are_not_skipped():
    layout, p, advantages, old = batch()
    options = {"old": old, "loss_type": "ppo", "importance_sampling_level": "step", "epsilon": 0.05, "ref": old + 0.1}
    want = step_policy_loss(torch.nn.functional.linear(p.hidden, p.weight, p.bias), layout, advantages, **options)
    for needs in [(0, 0, 0), (1, 0, 0), (1, 1, 1)]:
        out, _ = run(p, layout, advantages, needs, chunk_bytes=7 * V * 8, **options)
        torch.testing.assert_close(out.tokens, want.tokens)
        torch.testing.assert_close(out.step_logps, want.step_logps)
        assert set(out.metrics) == set(want.metrics)
        for name, value in want.metrics.items():
            torch.testing.assert_close(out.metrics[name], value, msg=name)


def test_metrics_are_over_the_rows_that_are_there():
    layout, p, advantages, old = batch()
    options = {"old": old, "loss_type": "ppo", "epsilon": 0.05, "ref": old + 0.1}
    whole, _ = run(p, layout, advantages, **options)
    some, _ = run(p, layout, advantages, skip_zero_advantages=True, **options)
    idle = expected_idle(layout, advantages, "token")
    same = set(whole.metrics) - {"kl", "ratio/mean", "steps/logps"}
    assert set(some.metrics) - set(whole.metrics) == {"tokens/skipped"} and some.metrics["tokens/skipped"] == idle.sum()
    for name in same:
        torch.testing.assert_close(some.metrics[name], whole.metrics[name], msg=name)
    ratio = (whole.tokens - old).exp()
    torch.testing.assert_close(some.metrics["ratio/mean"], ratio[~idle].mean())
    d = whole.tokens - options["ref"]
    torch.testing.assert_close(some.metrics["kl"], (torch.expm1(-d) + d)[~idle].mean())
    there = (advantages != 0) & (layout.counts > 0)
    torch.testing.assert_close(some.metrics["steps/logps"], whole.step_logps[there].mean())
    assert torch.equal(some.step_logps.isnan(), (advantages == 0) & (layout.counts > 0))


def test_kl_and_entropy_move_every_row():
    layout, p, advantages, old = batch()
    for more in ({"ref": old, "kl_coef": 0.1}, {"entropy_coef": 0.1}):
        leaves = p.leaves()
        logits = torch.nn.functional.linear(*leaves)
        want = collect(step_policy_loss(logits, layout, advantages, backend="reference", **more).loss, leaves, -1.5)
        out, got = run(p, layout, advantages, skip_zero_advantages=True, **more)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert not out.tokens.isnan().any()


@pytest.mark.parametrize("skip", [False, True])
def test_all_rows_idle(skip):
    layout, p, advantages, old = batch()
    for variant in ("reinforce", "gspo"):
        out, (loss, *gradients) = run(
            p, layout, 0 * advantages, skip_zero_advantages=skip, **with_old(VARIANTS[variant], old)
        )
        assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
        assert out.tokens.isnan().all() == skip and all(m.isfinite() for m in out.metrics.values())


def test_a_bad_value_shows_unless_it_is_skipped():
    layout, p, advantages, _ = batch()
    row = torch.nonzero(expected_idle(layout, advantages, "token"))[0, 0]
    p.hidden.view(-1, H)[layout.rows[row]] = torch.nan
    whole, _ = run(p, layout, advantages)
    some, gradients = run(p, layout, advantages, skip_zero_advantages=True)
    assert whole.loss.isnan() and some.loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [F64, torch.float16])
@pytest.mark.parametrize("needs", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)])
@pytest.mark.parametrize("level", ["token", "step", "sequence"])
def test_products_are_those_of_the_plan(level, needs, dtype):
    layout, p, advantages, old = batch(dtype)
    idle = int(expected_idle(layout, advantages, level).sum())
    busy = layout.num_rows - idle
    each = 1 + needs[0] + needs[1] + (dtype == torch.float16 and needs[1])
    chunk_bytes = 100 * V * dtype.itemsize
    for skip in (False, True):
        options = {"skip_zero_advantages": skip, "loss_type": "ppo", "importance_sampling_level": level}
        step = functools.partial(run, p, layout, advantages, needs, chunk_bytes=chunk_bytes, old=old, **options)
        flops = gemm_flops(step)
        plan = policy_plan(
            layout, importance_sampling_level=level, advantages=advantages, skip_zero_advantages=skip, vocab=V,
            hidden=H, dtype=dtype, chunk_bytes=chunk_bytes, hidden_gradient=bool(needs[0]),
            weight_gradient=bool(needs[1]), bias_gradient=bool(needs[2]),
        )  # fmt: skip
        assert flops == 2 * H * V * (each * busy + idle * (not skip))
        assert plan.flops == flops


def test_on_a_device_nothing_waits():
    """On `meta` tensors: advantages on the host drop rows there; those on the device drop none."""
    pytest.importorskip("triton")
    ledger = pytest.importorskip("benchmarks.kernels.ledger")
    layout, _, advantages, _ = batch()
    hidden = torch.empty(B, T, H, dtype=torch.bfloat16, device="meta").requires_grad_()
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta").requires_grad_()
    idle, all_rows = int(expected_idle(layout, advantages, "token").sum()), layout.num_rows

    def flops(given, **more):
        with ledger.record() as found:
            out = linear_step_policy_loss(hidden, weight, layout.to("meta"), given.float(), backend="triton", **more)
            out.loss.backward(torch.ones((), device="meta"))
            assert out.metrics
        assert not found.of("read back")
        return found.flops / (2 * H * V)

    host = forms(layout, advantages)
    assert flops(host["steps"].to("meta")) == flops(host["tokens"]) == 3 * all_rows
    for given in (host["steps"], host["rows"]):
        assert flops(given) == 3 * (all_rows - idle) + idle
        assert flops(given, skip_zero_advantages=True) == 3 * (all_rows - idle)
    logits = torch.empty(B, T, V, dtype=torch.bfloat16, device="meta").requires_grad_()
    with ledger.record() as found:
        step_policy_loss(logits, layout.to("meta"), advantages, backend="triton").loss.backward(
            torch.ones((), device="meta")
        )
    assert not found.of("read back")
    for given in (host["steps"].to("meta"), host["tokens"]):
        with pytest.raises(ValueError, match="skip_zero_advantages: expected advantages on the host"):
            linear_step_policy_loss(
                hidden, weight, layout.to("meta"), given, skip_zero_advantages=True, backend="reference"
            )


def test_compiled_calls_keep_every_row():
    layout, p, advantages, _ = batch(torch.float32)
    p.weight.requires_grad_()

    def loss(skip):
        return linear_step_policy_loss(p.hidden, p.weight, layout, advantages.float(), skip_zero_advantages=skip)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(False).loss, loss(False).loss)
    with pytest.raises(Exception, match="skip_zero_advantages: expected False under torch.compile"):
        compiled(True)
    with pytest.raises(TypeError, match="skip_zero_advantages: expected"):
        loss(1)
