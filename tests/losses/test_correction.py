# SPDX-License-Identifier: Apache-2.0
"""Importance weights of rollouts from another policy: values, bounds, what a loss does with them, metrics.

What they are unbiased for: test_correction_expectation.py.

Mutations, each caught by the test named:
  sampling - old in place of old - sampling          test_by_hand
  a sequence's sum over its steps' means             test_by_hand
  the weight into KL and entropy too                 test_weights_multiply_the_formula_alone
  the weights carry a gradient                       test_weights_are_constants
  a masked ratio left at the bound                   test_by_hand
  unknown log-probs as NaN                           test_unknown_log_probs
"""

import pytest
import torch
from helpers.batch import random_batch
from helpers.no_sync import NoSync
from helpers.policy import F64, VARIANTS, problem, with_old

from sspo_ext import StepLayout, StepLogps, linear_step_policy_loss, policy_loss, step_logps, step_policy_loss
from sspo_ext.formulas.policy import POLICY_FORMULAS, PolicyScores
from sspo_ext.losses import rollout_correction
from sspo_ext.losses.correction import MODES

LAYOUT = StepLayout.from_response(torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[0, 0, 1], [0, 1, -1]]))
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.1, 9.0]])
DIFFERENCE = torch.tensor([[0.5, 1.0, -0.25], [0.0, -2.0, 5.0]])  # old - sampling


@pytest.mark.parametrize(
    ("mode", "mean", "want"),
    [
        ("token_truncate", False, [0.5, 1.0, -0.25, 0.0, -1.0]),
        ("token_mask", False, [0.5, 1.0, -0.25, 0.0, None]),
        ("step_truncate", False, [1.2, 1.2, -0.25, 0.0, -1.0]),
        ("step_mask", False, [None, None, -0.25, 0.0, None]),
        ("step_mask", True, [0.75, 0.75, -0.25, 0.0, None]),
        ("sequence_truncate", False, [1.2, 1.2, 1.2, -1.0, -1.0]),
        ("sequence_mask", False, [None, None, None, None, None]),
        ("sequence_mask", True, [1.25 / 3, 1.25 / 3, 1.25 / 3, -1.0, -1.0]),
    ],
)
def test_by_hand(mode, mean, want):
    """Logarithms of the weights, bounds exp(-1) and exp(1.2); None is a weight of 0."""
    low, high = torch.tensor([-1.0, 1.2], dtype=F64).exp().tolist()
    low *= 1 - 1e-6  # exp of -1 in float32 is on either side of it
    found = rollout_correction(
        OLD, OLD - DIFFERENCE, LAYOUT, mode=mode, clip_max=high, clip_min=low, length_normalize=mean
    )
    want = torch.tensor([0.0 if x is None else torch.tensor(x).exp().item() for x in want])
    assert torch.allclose(found.weights, want, rtol=1e-5)


def test_forms_and_dtypes():
    """Padded, packed, rows, StepLogps; 16 bits are widened, float64 stays."""
    want = rollout_correction(OLD, OLD - DIFFERENCE, LAYOUT, mode="step_truncate").weights
    rows, drawn = (x.reshape(-1)[LAYOUT.places] for x in (OLD, OLD - DIFFERENCE))
    assert torch.equal(rollout_correction(rows, drawn, LAYOUT, mode="step_truncate").weights, want)
    steps = [StepLogps.from_tokens(x, LAYOUT) for x in (OLD, OLD - DIFFERENCE)]
    assert torch.equal(rollout_correction(*steps, LAYOUT, mode="step_truncate").weights, want)
    cu = torch.tensor([0, 3, 5])
    packed = StepLayout.from_response(torch.ones(5), torch.tensor([0, 0, 1, 0, 1]), cu_seqlens=cu)
    assert torch.equal(rollout_correction(rows, drawn, packed, mode="step_truncate").weights, want)
    wide = rollout_correction(OLD.double(), (OLD - DIFFERENCE).double(), LAYOUT, mode="step_truncate").weights
    assert wide.dtype == F64 and torch.allclose(wide.float(), want)
    assert rollout_correction(OLD.bfloat16(), OLD.bfloat16(), LAYOUT).weights.tolist() == [1.0] * 5


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("step")])
@pytest.mark.parametrize("bounds", [(3.0, None), (1.5, 0.5), (None, 0.7)])
def test_is_trls(mode, bounds):
    """TRL 1.16's arithmetic (GRPOTrainer._generate_and_score_completions), written on a padded batch."""
    g = torch.Generator().manual_seed(1)
    old, drawn = torch.randn(2, 5, 9, generator=g)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 2])[:, None]
    layout = StepLayout.from_response(mask)
    drawn[0, 2] = float("nan")
    difference = torch.nan_to_num((old - drawn) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    ratio = difference.exp()
    high, low = bounds
    if mode.endswith("truncate"):
        ratio = ratio.clamp(min=low, max=high)
    else:
        bad = (ratio < (-torch.inf if low is None else low)) | (ratio > (torch.inf if high is None else high))
        ratio = ratio.masked_fill(bad, 0.0)
    found = rollout_correction(old, drawn, layout, mode=mode, clip_max=high, clip_min=low)
    assert torch.allclose(found.weights, ratio.expand(5, 9)[mask], rtol=1e-5)


# ---- what a policy loss does with weights


@pytest.mark.parametrize("name", POLICY_FORMULAS)
def test_every_formula_is_linear_in_the_advantage(name):
    """So a weight that multiplies the advantage multiplies the formula; a new formula must be too."""
    g = torch.Generator().manual_seed(0)
    logp, advantage = torch.randn(2, 4000, generator=g, dtype=F64)
    ratio, weight = (
        (torch.randn(4000, generator=g, dtype=F64) * 0.5).exp(),
        torch.rand(4000, generator=g, dtype=F64) * 3,
    )
    formula = POLICY_FORMULAS[name]
    options = dict(zip(formula.options, formula.check_options({}), strict=True))
    plain = formula.fn(PolicyScores(logp, ratio, advantage), **options)
    assert torch.allclose(formula.fn(PolicyScores(logp, ratio, advantage * weight), **options), weight * plain)


@pytest.mark.interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_multiply_the_formula_alone(backend, variant):
    """Both routes and log-probs of an engine: the weighted loss without KL and entropy, plus these without weights."""
    if backend == "triton" and variant != "gspo":
        pytest.skip("interpreted, it takes seconds a variant")
    dtype = torch.float32 if backend == "triton" else F64
    batch, layout, advantages, old, ref = problem(seed=3, dtype=dtype)
    weights = torch.rand(layout.num_rows, generator=torch.Generator().manual_seed(9), dtype=dtype) * 2
    weights[::4] = 0
    options = with_old(VARIANTS[variant], old)
    terms = {"ref": ref, "kl_coef": 0.3, "entropy_coef": 0.1}
    hidden, head = batch.logits, torch.eye(batch.logits.shape[-1], dtype=dtype)

    def gradient(logits, loss):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        return value.detach(), leaf.grad

    def want(leaf):  # without weights but on what multiplies all of L_t
        formula = policy_loss(
            step_logps(leaf, layout, backend="reference"), layout, advantages, token_weights=weights,
            backend="reference", **options,
        )  # fmt: skip
        more = step_policy_loss(leaf, layout, torch.zeros_like(advantages), backend="reference", **options, **terms)
        return formula.loss + more.loss

    expected = gradient(batch.logits, want)
    given = {"importance_weights": weights, "backend": backend, **options, **terms}
    aligned = torch.full(layout.shape, torch.nan, dtype=dtype).reshape(-1).index_copy(0, layout.places, weights)
    for loss in (
        lambda leaf: step_policy_loss(leaf, layout, advantages, **given).loss,
        lambda leaf: (
            step_policy_loss(
                leaf, layout, advantages, **{**given, "importance_weights": aligned.view(layout.shape)}
            ).loss
        ),
        lambda leaf: linear_step_policy_loss(leaf, head, layout, advantages, **given).loss,
        lambda leaf: (
            linear_step_policy_loss(leaf, head, layout, advantages, chunk_bytes=2 * 11 * dtype.itemsize, **given).loss
        ),
        lambda leaf: policy_loss(step_logps(leaf, layout, entropy=True), layout, advantages, **given).loss,
    ):
        found = gradient(hidden, loss)
        size = 1e-11 if dtype == F64 else 2e-5
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= size * b.abs().max().clamp(min=1)


def test_weights_are_constants():
    batch, layout, advantages, *_ = problem(seed=3)
    old = step_logps(batch.logits.clone().requires_grad_(), layout)
    found = rollout_correction(old, old.tokens.detach() - 0.3, layout, mode="token_truncate")
    assert not found.weights.requires_grad
    assert not any(value.requires_grad for value in found.metrics.values())
    weights = found.weights.clone().requires_grad_()
    leaf = batch.logits.clone().requires_grad_()
    step_policy_loss(leaf, layout, advantages, importance_weights=weights).loss.backward()
    assert weights.grad is None and leaf.grad.abs().max() > 0


# ---- metrics, the host, messages


def test_metrics():
    found = rollout_correction(OLD, OLD - DIFFERENCE, LAYOUT, mode="step_mask", clip_max=3.0).metrics
    d = torch.tensor([0.5, 1.0, -0.25, 0.0, -2.0], dtype=F64)
    w = torch.tensor([0.0, 0.0, -0.25, 0.0, -2.0], dtype=F64).exp() * torch.tensor([0, 0, 1, 1, 1])
    want = {
        "sampling/sampling_logp_difference/mean": d.abs().mean(),
        "sampling/sampling_logp_difference/max": 2.0,
        "sampling/importance_sampling_ratio/mean": w.mean(),
        "sampling/importance_sampling_ratio/max": 1.0,
        "sampling/importance_sampling_ratio/clipped": 0.4,
        "sampling/ratio/mean": d.exp().mean(),
        "sampling/ratio/max": torch.tensor(1.0).exp(),
        "sampling/kl_k1": -d.mean(),
        "sampling/kl_k3": (d.exp() - 1 - d).mean(),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in want.items()}, rel=1e-5
    )


def test_unknown_log_probs():
    """A NaN has ratio 1 and is in no metric; all of them unknown is no correction."""
    drawn = (OLD - DIFFERENCE).clone()
    drawn[0, 1] = torch.nan
    found = rollout_correction(OLD, drawn, LAYOUT, mode="step_truncate")
    assert torch.allclose(found.weights, torch.tensor([0.5, 0.5, -0.25, 0.0, -2.0]).exp())
    d = torch.tensor([0.5, -0.25, 0.0, -2.0])
    assert found.metrics["sampling/ratio/mean"].item() == pytest.approx(d.exp().mean().item())
    nothing = rollout_correction(OLD, torch.full_like(OLD, torch.nan), LAYOUT)
    assert nothing.weights.tolist() == [1.0] * 5 and nothing.metrics["sampling/kl_k1"].item() == 0
    empty = StepLayout.from_response(torch.zeros(2, 3), torch.full((2, 3), -1))
    assert rollout_correction(OLD, OLD, empty).weights.shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits(mode):
    batch = random_batch(3)
    layout, tokens = batch.layout, torch.randn(batch.layout.num_rows)
    want = rollout_correction(tokens, tokens - 0.2, layout, mode=mode)
    with NoSync():
        found = rollout_correction(tokens, tokens - 0.2, layout, mode=mode)
    assert torch.equal(found.weights, want.weights)


def test_idle_rows_stay_idle():
    """Weights take nothing away from what the host knows of advantages that are 0."""
    batch, layout, advantages, *_ = problem(seed=3, dtype=torch.float32)
    advantages = advantages * (torch.arange(len(advantages)) % 2)
    weights = torch.rand(layout.num_rows)
    out = linear_step_policy_loss(
        batch.logits, torch.eye(11), layout, advantages, importance_weights=weights, skip_zero_advantages=True
    )
    assert out.tokens.isnan().any() and out.metrics["tokens/skipped"] == out.tokens.isnan().sum()


def test_messages():
    for more, message in (
        ({"mode": "step"}, "mode: expected one of .*'step_mask'.*, got 'step'"),
        ({"clip_max": -1.0}, "clip_max"),
        ({"clip_max": 1.0, "clip_min": 1.0}, "clip_min: expected less than clip_max=1.0, got 1.0"),
        ({"mode": "step_truncate", "clip_max": None}, "clip_max: expected a bound for mode 'step_truncate'"),
        ({"mode": "token_mask", "length_normalize": True}, "length_normalize: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout_correction(OLD, OLD, LAYOUT, **more)
    with pytest.raises(ValueError, match="sampling: expected"):
        rollout_correction(OLD, OLD[:, :2], LAYOUT)
    with pytest.raises(TypeError, match="layout: expected a StepLayout"):
        rollout_correction(OLD, OLD, OLD)
    batch, layout, advantages, *_ = problem(seed=3)
    with pytest.raises(ValueError, match="importance_weights: expected"):
        step_policy_loss(batch.logits, layout, advantages, importance_weights=torch.ones(3, dtype=F64))
