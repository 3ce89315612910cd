"""Policy losses on the logits route: golden values, gradcheck, an oracle that loops over tokens, contracts, errors.

Mutations of sspo_ext/{policy,policy_losses}.py, each caught by the test named:
  the product's ratio moves as the mean's does               test_equals_the_oracle[rloo]
  clip at 1 + epsilon above                                  test_equals_the_oracle[clip-higher]
  log-ratios held at 200                                     test_ratios_beyond_any_range_stay_finite
  k2 without its half                                        test_golden_kl
  the loss summed by torch.sum                               test_same_bits_at_any_thread_count
  no stop-gradient in a ratio without old log-probs          test_first_update_of_every_loss_is_reinforce
  a summed ratio without old moves as a mean's does          test_without_old_log_probs_it_is_the_first_update
  empty steps and sequences in the mean                      test_equals_the_oracle[reinforce]
  masked tokens in the normaliser                            test_probability_mask
  one over num_items unguarded                               test_num_items_of_nothing
  clip_ratio/high_mean of any advantage's sign               test_golden_metrics
  (B, T) values taken a position early                       test_advantages_and_log_probs_in_every_form
"""

import itertools
import math

import pytest
import torch
from helpers.batch import random_batch
from helpers.policy import AGGREGATIONS, VARIANTS, with_old
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss
from sspo_ext.objective.sums import StepLogps

F64 = torch.float64


def problem(seed=0, B=4, T=14, V=11, dtype=F64, weighted=False):
    """Batch, layout, one advantage a step, and old and reference log-probs near the policy's, (N,)."""
    batch = random_batch(seed, B, T, V, weighted=weighted, dtype=dtype)
    layout = batch.layout
    g = torch.Generator().manual_seed(seed + 1)
    advantages = torch.randn(layout.num_steps, generator=g, dtype=F64).to(dtype)
    tokens = step_logps(batch.logits, layout, backend="reference").tokens
    old, ref = (tokens + torch.randn(tokens.shape, generator=g, dtype=F64).to(tokens.dtype) * s for s in (0.2, 0.3))
    return batch, layout, advantages, old, ref


def oracle(batch, advantages, old, ref, *, loss_type="reinforce", importance_sampling_level="token",
           length_normalize=True, epsilon=0.2, epsilon_high=None, delta=None, kl_coef=0.0, kl_estimator="k3",
           entropy_coef=0.0, prob_threshold=None, aggregation="token", num_items=None):  # fmt: skip
    """One token at a time, in Python's scalars but for log pi. Advantages (S,), old and ref in row order."""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    labels, ids, weights = batch.labels, batch.step_ids, batch.token_weights
    tokens, row, step = [], 0, 0  # (sequence, step, log pi, entropy, old, ref, advantage, weight)
    for b in range(len(labels)):
        for k in range(int(ids[b].max()) + 1):
            for t in range(1, labels.shape[1]):
                w = 1.0 if weights is None else float(weights[b, t])
                if int(ids[b, t]) == k and int(labels[b, t]) != -100 and w != 0:
                    logp = torch.log_softmax(batch.logits[b, t - 1], -1)
                    entropy = -(logp.exp() * logp).sum()
                    label = logp[labels[b, t]]
                    tokens.append(
                        (b, step, label, entropy, float(old[row]), float(ref[row]), float(advantages[step]), w)
                    )
                    row += 1
            step += 1
    total, seen = 0.0, {}
    for token in tokens:
        b, k, logp, entropy, old_logp, ref_logp, advantage, w = token
        same = [
            u
            for u in tokens
            if {"token": u is token, "step": u[1] == k, "sequence": u[0] == b}[importance_sampling_level]
        ]
        value = sum(u[2].item() - u[4] for u in same)
        power = 1.0
        if length_normalize:
            value /= len(same)
        else:
            power = len(same)
        ratio = math.exp(value) * torch.exp(power * (logp - logp.detach()))
        if loss_type == "reinforce":
            loss = -advantage * logp
        elif loss_type == "cispo":
            loss = -min(ratio.item(), epsilon_high) * advantage * logp
        else:
            clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high) * advantage
            loss = -torch.min(ratio * advantage, clipped)
            if delta is not None and advantage < 0:  # as the dual-clip paper writes it
                loss = -torch.max(-loss, delta * torch.tensor(advantage, dtype=F64))
        d = logp - ref_logp
        loss = loss + kl_coef * {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[kl_estimator]
        loss = (loss - entropy_coef * entropy) * w
        if prob_threshold is None or math.exp(old_logp) < prob_threshold:
            key = {"token": 0, "sum": 0, "step": k, "sequence": b}[aggregation]
            seen.setdefault(key, []).append(loss)
    for members in seen.values():
        total = total + sum(members) / (len(members) if aggregation in ("step", "sequence") else 1)
    if num_items is None:
        num_items = {"sum": 1, "token": len(seen.get(0, []))}.get(aggregation, len(seen))
    return total / max(num_items, 1)


def gradient(fn, logits):
    leaf = logits.detach().clone().requires_grad_()
    loss = fn(leaf)
    (loss * 1.7).backward()
    return loss.detach(), leaf.grad


def both(batch, layout, advantages, old, ref, options, oracle_options, backend):
    def theirs(logits):
        return oracle(type(batch)(logits, batch.labels, batch.step_ids, batch.token_weights), advantages, old, ref,
                      **oracle_options)  # fmt: skip

    def ours(logits):
        return step_policy_loss(logits, layout, advantages, backend=backend, **options).loss

    return gradient(ours, batch.logits), gradient(theirs, batch.logits)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle(name, variant):
    """Every head with KL term and entropy bonus, under every aggregation, with and without token weights."""
    for i, (aggregation, weighted) in enumerate(itertools.product(AGGREGATIONS, (False, True))):
        batch, layout, advantages, old, ref = problem(seed=i, weighted=weighted, B=3)
        extra = {"kl_coef": 0.1, "kl_estimator": f"k{i % 3 + 1}", "aggregation": aggregation,
                 "entropy_coef": 0.05 * (i % 2)}  # fmt: skip
        if i > 4:
            extra["num_items"] = 7
        options = with_old(VARIANTS[variant], old) | extra
        (loss, grad), (want, want_grad) = both(
            batch, layout, advantages, old, ref, options | {"ref": ref}, VARIANTS[variant] | extra, name
        )
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", ["reinforce", "ppo", "gspo"])
def test_probability_mask(aggregation, variant):
    """SPO: tokens that the old policy was sure of do not count, in no normaliser either."""
    batch, layout, advantages, old, ref = problem(seed=3)
    threshold = float(old.exp().median())
    options = VARIANTS[variant] | {"prob_threshold": threshold, "aggregation": aggregation}
    (loss, grad), (want, want_grad) = both(batch, layout, advantages, old, ref, options | {"old": old}, options, "auto")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, want_grad)
    out = step_policy_loss(batch.logits, layout, advantages, old=old, **options)
    assert int(out.metrics["tokens/count"]) == int((old.exp() < threshold).sum()) < layout.num_rows


# ---- golden values, by hand


EVEN = (math.log(0.5), math.log(0.5))


def two_tokens(old=EVEN, p=(0.75, 0.25), **kw):
    """One sequence, one step of two tokens whose probabilities are p."""
    logits = torch.tensor(
        [[[math.log(p[0]), math.log(1 - p[0])], [math.log(p[1]), math.log(1 - p[1])], [0, 0]]], dtype=F64
    )
    layout = StepLayout.from_step_ids(torch.tensor([[1, 0, 0]]), torch.tensor([[-1, 0, 0]]))
    advantages = kw.pop("advantages", torch.tensor([2.0], dtype=F64))
    if old is not None:
        kw["old"] = torch.tensor(old, dtype=F64)
    return step_policy_loss(logits, layout, advantages, **kw)


@pytest.mark.parametrize(
    "options, want",
    [
        # ratios 1.5 and .5; A = 2
        ({"loss_type": "ppo", "aggregation": "sum"}, -2 * (1.2 + 0.5)),
        ({"loss_type": "ppo", "aggregation": "sum", "epsilon_high": 0.4}, -2 * (1.4 + 0.5)),
        ({"loss_type": "ppo", "aggregation": "token"}, -(1.2 + 0.5)),
        ({"loss_type": "cispo", "epsilon_high": 1.25, "aggregation": "sum"},
         -2 * (1.25 * math.log(0.75) + 0.5 * math.log(0.25))),
        # the mean ratio is sqrt(.75), the product .75: below 1 - .2
        ({"loss_type": "ppo", "importance_sampling_level": "step"}, -2 * math.sqrt(0.75)),
        ({"loss_type": "ppo", "importance_sampling_level": "sequence", "length_normalize": False}, -2 * 0.75),
        # A = -2: clipped below, unbounded above
        ({"loss_type": "ppo", "aggregation": "sum", "advantages": torch.tensor([-2.0], dtype=F64)}, 2 * (1.5 + 0.8)),
        ({"loss_type": "ppo", "aggregation": "sum", "delta": 1.3, "advantages": torch.tensor([-2.0], dtype=F64)},
         2 * (1.3 + 0.8)),
    ],
)  # fmt: skip
def test_golden_values(options, want):
    torch.testing.assert_close(two_tokens(**options).loss, torch.tensor(want, dtype=F64))


@pytest.mark.parametrize(
    "estimator, want",
    [("k1", math.log(1.5) + math.log(0.5)), ("k2", (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 2),
     ("k3", (1 / 1.5 - 1 + math.log(1.5)) + (2 - 1 + math.log(0.5)))],
)  # fmt: skip
def test_golden_kl(estimator, want):
    ref = torch.log(torch.tensor([0.5, 0.5], dtype=F64))
    none = torch.zeros(1, dtype=F64)
    out = two_tokens(None, advantages=none, ref=ref, kl_coef=3.0, kl_estimator=estimator, aggregation="sum")
    torch.testing.assert_close(out.loss, torch.tensor(3 * want, dtype=F64))
    torch.testing.assert_close(out.metrics["kl"], torch.tensor(want / 2, dtype=F64))


def test_golden_entropy():
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    out = two_tokens(None, advantages=torch.zeros(1, dtype=F64), entropy_coef=0.5)
    torch.testing.assert_close(out.loss, torch.tensor(-0.5 * h, dtype=F64))
    torch.testing.assert_close(out.metrics["entropy"], torch.tensor(h, dtype=F64))


def test_golden_metrics():
    out = two_tokens(loss_type="ppo")
    want = {"ratio/mean": 1.0, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.5, "clip_ratio/region_mean": 0.5,
            "policy_loss": -1.7, "advantages/mean": 2.0, "tokens/count": 2, "steps/count": 1, "steps/tokens": 2.0,
            "steps/empty": 0, "steps/logps": math.log(0.1875)}  # fmt: skip
    assert set(out.metrics) == set(want)
    for name, value in want.items():
        assert out.metrics[name].ndim == 0 and float(out.metrics[name]) == pytest.approx(value), name
    below = two_tokens(loss_type="ppo", advantages=torch.tensor([-1.0], dtype=F64)).metrics
    assert float(below["clip_ratio/low_mean"]) == 0.5 and float(below["clip_ratio/high_mean"]) == 0.0


@pytest.mark.parametrize("weighted", [False, True])
def test_summed_reinforce_is_minus_the_sum_of_a_s(weighted):
    batch, layout, advantages, _, _ = problem(weighted=weighted)
    out = step_policy_loss(batch.logits, layout, advantages, aggregation="sum")
    torch.testing.assert_close(out.loss, -(advantages * step_logps(batch.logits, layout).sums).sum())


def test_first_update_of_every_loss_is_reinforce():
    """Without old log-probs a ratio is 1 and moves as log pi does."""
    batch, layout, advantages, _, _ = problem()
    _, want = gradient(lambda x: step_policy_loss(x, layout, advantages).loss, batch.logits)
    for level in ("token", "step", "sequence"):
        _, got = gradient(
            lambda x, level=level: (
                step_policy_loss(x, layout, advantages, loss_type="ppo", importance_sampling_level=level).loss
            ),
            batch.logits,
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("level", ["step", "sequence"])
def test_without_old_log_probs_it_is_the_first_update(level, mean, name):
    """Also of a summed ratio, whose gradient has the segment's length in it; on both routes."""
    batch, layout, advantages, _, _ = problem()
    options = {"loss_type": "ppo", "importance_sampling_level": level, "length_normalize": mean, "backend": name}
    old = step_logps(batch.logits, layout, backend=name).tokens
    given, absent = (
        gradient(lambda x, o=o: step_policy_loss(x, layout, advantages, old=o, **options).loss, batch.logits)
        for o in (old, None)
    )
    torch.testing.assert_close(absent, given)
    weight = torch.randn(batch.logits.shape[-1], 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(*batch.labels.shape, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    old = step_logps(hidden @ weight.T, layout).tokens
    given, absent = (
        gradient(lambda x, o=o: linear_step_policy_loss(x, weight, layout, advantages, old=o, **options).loss, hidden)
        for o in (old, None)
    )
    torch.testing.assert_close(absent, given)


# ---- derivatives


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


# ---- forms of the arguments


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


# ---- contracts


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
        ({"loss_type": "grpo"}, ValueError, "loss_type: expected one of 'reinforce', 'ppo', 'cispo'"),
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
