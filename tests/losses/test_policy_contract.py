# SPDX-License-Identifier: Apache-2.0
"""Policy losses on the logits route: gradcheck, forms of the arguments, limits, messages.

Mutations of sspo_ext/objective/policy.py, each caught by the test named:
  log-ratios held at 200                                     test_ratios_beyond_any_range_stay_finite
  the loss summed by torch.sum                               test_same_bits_at_any_thread_count
  one over num_items unguarded                               test_num_items_of_nothing
  (B, T) values taken a position early                       test_advantages_and_log_probs_in_every_form
"""

import pytest
import torch
from helpers.policy import AGGREGATIONS, F64, VARIANTS, gradient, problem, with_old
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.objective.sums import StepLogps


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "cispo"])
def test_gradcheck(variant):
    """Against finite differences, where the loss is one: advantages equal within a ratio's segment, and clip ranges
    whose corners no log-prob is near. A CISPO loss is none, by its stop-gradient."""
    batch, layout, advantages, old, ref = problem(seed=5, B=2, T=7, V=5)
    options = with_old(VARIANTS[variant], old)
    if options.get("importance_sampling_level") == "sequence":
        advantages = torch.tensor([1.0, -1.0], dtype=F64)[layout.step_sequence.long()]
    for aggregation, estimator in (("sequence", "k1"), ("step", "k2"), ("sequence", "k3")):
        if options.get("importance_sampling_level") == "sequence" and aggregation == "step":
            continue  # steps of different lengths weigh a sequence's tokens differently

        def loss(x, aggregation=aggregation, estimator=estimator):
            return step_policy_loss(
                x, layout, advantages, aggregation=aggregation, ref=ref, kl_coef=0.3, kl_estimator=estimator,
                entropy_coef=0.2, **options,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, batch.logits.clone().requires_grad_())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(sorted(VARIANTS)), st.sampled_from(AGGREGATIONS))
def test_each_token_is_moved_by_its_own_advantage(seed, variant, aggregation):
    """Only the rows of a step with an advantage get gradient, also where its sequence shares the ratio."""
    batch, layout, advantages, old, _ = problem(seed=seed)
    filled = torch.nonzero(layout.counts > 0).flatten()
    if not len(filled):
        return
    chosen = int(filled[seed % len(filled)])
    only = torch.zeros_like(advantages)
    only[chosen] = 0.01
    options = with_old(VARIANTS[variant] | {"aggregation": aggregation}, old)
    _, grad = gradient(lambda x: step_policy_loss(x, layout, only, **options).loss, batch.logits)
    moved = grad.reshape(-1, grad.shape[-1]).abs().sum(1).nonzero().flatten().tolist()
    assert set(moved) <= set(layout.rows[layout.step_of_row == chosen].tolist())


def test_double_backward_is_refused():
    batch, layout, advantages, old, _ = problem()
    leaf = batch.logits.clone().requires_grad_()
    loss = step_policy_loss(leaf, layout, advantages, loss_type="ppo", old=old).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_advantages_and_log_probs_in_every_form():
    batch, layout, advantages, old, ref = problem(weighted=True)

    def grid(rows):
        out = torch.full((layout.shape[0] * layout.shape[1],), float("nan"), dtype=F64)
        return out.index_copy(0, layout.rows + 1, rows).view(layout.shape)

    def value(a, o, r):
        return step_policy_loss(batch.logits, layout, a, old=o, ref=r, kl_coef=0.1, loss_type="ppo").loss

    rows = advantages[layout.step_of_row]
    want = value(advantages, old, ref)
    empty = torch.zeros(0)
    for form in (lambda x: x, grid, lambda x: StepLogps(empty, layout.counts, x)):
        assert torch.equal(value(advantages, form(old), form(ref)), want)
    for a in (rows, grid(rows)):
        assert torch.equal(value(a, old, ref), want)
    assert torch.equal(value(advantages.requires_grad_(), old, ref), want), "advantages are constants"


def test_plain_labels():
    batch, layout, advantages, old, _ = problem()
    got = step_policy_loss(batch.logits, batch.labels, advantages, step_ids=batch.step_ids, loss_type="ppo", old=old)
    assert torch.equal(got.loss, step_policy_loss(batch.logits, layout, advantages, loss_type="ppo", old=old).loss)


def test_num_items_splits_a_batch():
    """Two micro-batches with the whole batch's number give its loss."""
    batch, layout, advantages, old, _ = problem(B=6)
    for aggregation, items in (
        ("token", layout.num_rows),
        ("step", int((layout.counts > 0).sum())),
        ("sequence", len(layout.step_sequence[layout.counts > 0].unique())),
    ):
        options = {"loss_type": "ppo", "aggregation": aggregation}
        whole = step_policy_loss(batch.logits, layout, advantages, old=old, **options).loss
        parts = 0.0
        for half in (slice(0, 3), slice(3, 6)):
            part = StepLayout.from_step_ids(batch.labels[half], batch.step_ids[half])
            steps = (layout.step_sequence >= half.start) & (layout.step_sequence < half.stop)
            mine = steps[layout.step_of_row]
            for number in (items, torch.tensor(items)):
                parts += step_policy_loss(
                    batch.logits[half], part, advantages[steps], old=old[mine], num_items=number, **options
                ).loss
        torch.testing.assert_close(parts / 2, whole)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_score(name, variant, aggregation):
    for step_ids in (torch.full((2, 4), -1), torch.tensor([[-1, 0, 0, 0], [-1, -1, -1, -1]])):
        layout = StepLayout.from_step_ids(torch.full((2, 4), -100), step_ids)
        logits = torch.randn(2, 4, 5, requires_grad=True)
        none = torch.zeros(0)
        out = step_policy_loss(
            logits, layout, torch.ones(layout.num_steps), ref=none, kl_coef=0.1, entropy_coef=0.1,
            aggregation=aggregation, backend=name, **with_old(VARIANTS[variant], none),
        )  # fmt: skip
        out.loss.backward()
        assert out.loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
        assert all(m.ndim == 0 and m == m and (m == 0 or n == "steps/empty") for n, m in out.metrics.items())


def test_num_items_of_nothing():
    batch, layout, advantages, _, _ = problem()
    for zero in (0, torch.tensor(0)):
        assert step_policy_loss(batch.logits, layout, advantages, num_items=zero).loss == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_ratios_beyond_any_range_stay_finite(variant):
    batch, layout, advantages, old, _ = problem(dtype=torch.float32)
    for shift in (-200.0, 200.0):
        for zero in (False, True):
            given = torch.zeros_like(advantages) if zero else advantages
            loss, grad = gradient(
                lambda x, given=given, shift=shift: (
                    step_policy_loss(x, layout, given, **with_old(VARIANTS[variant], old + shift)).loss
                ),
                batch.logits,
            )
            assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_non_finite_logits_are_seen():
    batch, layout, advantages, old, _ = problem()
    logits = batch.logits.clone()
    logits.view(-1, logits.shape[-1])[layout.rows[0], 0] = float("nan")
    for variant in VARIANTS.values():
        assert step_policy_loss(logits, layout, advantages, **with_old(variant, old)).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    batch, layout, advantages, old, _ = problem(dtype=dtype)
    out = step_policy_loss(batch.logits, layout, advantages, old=old, loss_type="ppo")
    exact = step_policy_loss(batch.logits.double(), layout, advantages.double(), old=old.double(), loss_type="ppo")
    assert out.loss.dtype == out.tokens.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss.float())


def test_same_bits_at_any_thread_count():
    """More rows than torch sums with one thread."""
    g = torch.Generator().manual_seed(0)
    B, T = 40, 1000
    labels = torch.randint(0, 3, (B, T), generator=g)
    layout = StepLayout.from_step_ids(labels, torch.arange(T).div(70, rounding_mode="floor").expand(B, T))
    logits, advantages = torch.randn(B, T, 3, generator=g), torch.randn(layout.num_steps, generator=g)
    options = {"loss_type": "ppo", "old": torch.randn(layout.num_rows, generator=g) - 1}
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            for level in ("token", "sequence"):
                options["importance_sampling_level"] = level
                results.append(gradient(lambda x: step_policy_loss(x, layout, advantages, **options).loss, logits))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 1):
        assert all(torch.equal(a, b) for r in results[i::2] for a, b in zip(r, results[i], strict=True))


def test_inplace_backward():
    batch, layout, advantages, old, _ = problem()
    _, want = gradient(lambda x: step_policy_loss(x, layout, advantages, old=old, loss_type="ppo").loss, batch.logits)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1
    out = step_policy_loss(logits, layout, advantages, old=old, loss_type="ppo", inplace_backward=True)
    (out.loss * 1.7).backward()
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"loss_type": "vpg"}, ValueError, "loss_type: expected one of 'reinforce', 'ppo', 'cispo'"),
        ({"loss_type": "grpo"}, ValueError, "got 'grpo'; GRPO's loss is called 'ppo', with aggregation='sequence'"),
        ({"loss_type": "sigmoid"}, ValueError, "loss_type: 'sigmoid' is a preference loss: call step_pref_loss"),
        ({"epsilon": 0.1}, TypeError, "epsilon: neither a common option nor one of loss_type 'reinforce'"),
        ({"loss_type": "ppo", "beta": 0.1}, TypeError, "beta: neither a common option"),
        ({"loss_type": "ppo", "epsilon": 1.5}, ValueError, r"epsilon: expected a number in \[0, 1\]"),
        ({"loss_type": "ppo", "epsilon": "0.2"}, TypeError, "epsilon: expected a number"),
        ({"loss_type": "ppo", "epsilon_high": float("inf")}, ValueError, "epsilon_high: expected a finite number"),
        ({"loss_type": "ppo", "delta": 1.1}, ValueError, "delta: expected more than 1 \\+ epsilon_high = 1.2"),
        ({"loss_type": "ppo", "old": 0}, TypeError, "old: expected a torch.Tensor"),
        ({"old": torch.zeros(3)}, ValueError, "old: loss_type 'reinforce' has no ratio"),
        ({"loss_type": "ppo", "old": torch.zeros(3)}, ValueError, "old: expected .* rows"),
        ({"importance_sampling_level": "step"}, ValueError, "importance_sampling_level: loss_type 'reinforce' has no"),
        ({"loss_type": "ppo", "importance_sampling_level": "word"}, ValueError, "importance_sampling_level: expected"),
        ({"loss_type": "ppo", "length_normalize": False}, ValueError, "length_normalize: expected True"),
        ({"loss_type": "ppo", "length_normalize": 1}, TypeError, "length_normalize: expected True or False"),
        ({"prob_threshold": 0.9}, ValueError, "old: expected log-probs for prob_threshold"),
        ({"prob_threshold": 1.2}, ValueError, r"prob_threshold: expected a number in \(0, 1\]"),
        ({"kl_coef": 0.1}, ValueError, "ref: expected log-probs for the KL term"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef: expected a finite number, 0 or above"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of 'k1', 'k2', 'k3'"),
        ({"entropy_coef": None}, TypeError, "entropy_coef: expected a number"),
        ({"aggregation": "mean"}, ValueError, "aggregation: expected one of"),
        ({"num_items": -1}, ValueError, "num_items: "),
        ({"num_items": torch.tensor(-1)}, ValueError, "num_items: expected a finite number, 0 or above, got -1"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items: expected shape \(\)"),
        ({"advantages": torch.ones(1)}, ValueError, "advantages: expected .* a step"),
        ({"advantages": torch.ones(2, 2)}, ValueError, "advantages: expected shape"),
        ({"advantages": [1.0]}, TypeError, "advantages: expected a torch.Tensor"),
        ({"step_ids": torch.ones(2, 2)}, TypeError, "step_ids: given beside a StepLayout"),
        ({"backend": "none"}, ValueError, "backend: "),
    ],
)
def test_errors_name_the_argument(change, error, match):
    batch, layout, advantages, _, _ = problem()
    args = {"advantages": advantages} | change
    with pytest.raises(error, match=match):
        step_policy_loss(batch.logits, layout, args.pop("advantages"), **args)


def test_as_many_steps_as_rows_is_ambiguous():
    """Steps of 2, 0 and 1 tokens: three values may be steps' or rows'."""
    layout = StepLayout.from_step_ids(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[-1, 0, 0, 2]]))
    with pytest.raises(ValueError, match="advantages: .* may be steps' or tokens' here"):
        step_policy_loss(torch.zeros(1, 4, 3), layout, torch.ones(3))
