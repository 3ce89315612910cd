# SPDX-License-Identifier: Apache-2.0
"""Policy losses on the logits route: golden values and an oracle that loops over tokens.

Mutations of sspo_ext/objective/policy.py, each caught by the test named:
  the product's ratio moves as the mean's does               test_equals_the_oracle[rloo]
  clip at 1 + epsilon above                                  test_equals_the_oracle[clip-higher]
  k2 without its half                                        test_golden_kl
  no stop-gradient in a ratio without old log-probs          test_first_update_of_every_loss_is_reinforce
  a summed ratio without old moves as a mean's does          test_without_old_log_probs_it_is_the_first_update
  empty steps and sequences in the mean                      test_equals_the_oracle[reinforce]
  masked tokens in the normaliser                            test_probability_mask
  clip_ratio/high_mean of any advantage's sign               test_golden_metrics
"""

import itertools
import math

import pytest
import torch
from helpers.policy import AGGREGATIONS, F64, VARIANTS, gradient, problem, with_old

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.policy import linear_step_policy_loss, step_policy_loss


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


def test_a_ratio_of_a_step_is_that_of_its_masked_tokens_too():
    """By hand: a step of two tokens, of which the first had a probability of .95 and does not count."""
    layout = StepLayout.from_step_ids(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]))
    old = torch.log(torch.tensor([0.95, 0.2], dtype=F64))
    for now in (0.95, 0.5):  # of the first token
        p = torch.tensor([[0.0, now, 1 - now], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=F64)
        logits = p.log()[None].clamp(min=-50).requires_grad_()
        options = dict(loss_type="ppo", old=old, prob_threshold=0.9, epsilon=0.9, aggregation="token")
        for level, ratio in (("token", 0.25 / 0.2), ("step", math.sqrt(now / 0.95 * 0.25 / 0.2))):
            out = step_policy_loss(logits, layout, torch.ones(1, dtype=F64), importance_sampling_level=level, **options)
            assert out.loss.item() == pytest.approx(-ratio, rel=1e-9), (now, level)
            (grad,) = torch.autograd.grad(out.loss, logits)
            assert (grad[0, 0] == 0).all() and grad[0, 1, 2] < 0, "the masked token itself is not moved"
