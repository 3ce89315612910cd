# SPDX-License-Identifier: Apache-2.0
"""Importance weights of rollouts from another policy: values, what they are unbiased for, bounds, metrics.

The toy has three tokens, sequences of three, and tables of probabilities for the trainer and the engine, so that every
expectation is a sum over 27 sequences. On the linear route the hidden states name the prefix and the head is the table.

Mutations, each caught by the test named:
  sampling - old in place of old - sampling          test_by_hand
  a sequence's sum over its steps' means             test_by_hand
  the weight into KL and entropy too                 test_weights_multiply_the_formula_alone
  the weights carry a gradient                       test_weights_are_constants
  a masked ratio left at the bound                   test_by_hand, test_bounds_cost_what_the_formula_says
  unknown log-probs as NaN                           test_unknown_log_probs
  sets of kept tokens left out of the loss           test_top_p_is_the_gradient_of_the_policy_that_was_sampled
"""

import itertools

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
    if backend == "triton" and variant not in ("dual-clip", "gspo"):
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


# ---- expectations over all sequences of the toy

TOKENS, LENGTH = 3, 3
SEQUENCES = list(itertools.product(range(TOKENS), repeat=LENGTH))
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(TOKENS), repeat=n)]
STEPS = [0, 0, 1]  # two tokens, then one
G = torch.Generator().manual_seed(0)
THETA = torch.randn(len(PREFIXES), TOKENS, generator=G, dtype=F64)  # the trainer's logits after each prefix
ENGINE = THETA + 0.7 * torch.randn(THETA.shape, generator=G, dtype=F64)
UNITS = {"token": [1, 2, 3], "step": [2, 3], "sequence": [3]}  # where a token, step or sequence ends
SIGNAL = {s[:n]: torch.randn((), generator=G, dtype=F64) for n in (1, 2, 3) for s in SEQUENCES}  # of what ends there


def logp_of(table, tokens):
    """log p(tokens) under a table, whose rows may be narrowed with -inf."""
    rows = table.log_softmax(-1)
    return sum((rows[PREFIXES.index(tokens[:t]), tokens[t]] for t in range(len(tokens))), torch.zeros((), dtype=F64))


def batch_of(sequence):
    """A prompt of one token and the sequence: layout, and hidden states that name the prefixes."""
    labels = torch.tensor([[-100, *sequence]])
    layout = StepLayout.from_step_ids(labels, torch.tensor([[-1, *STEPS]]))
    at = [PREFIXES.index(sequence[:t]) for t in range(LENGTH)]
    hidden = torch.nn.functional.one_hot(torch.tensor([[*at, 0]]), len(PREFIXES)).to(F64)
    return layout, hidden


def gradient_of(sequence, level, route, drawn, loss_type="reinforce", kept=None, **correction):
    """d loss / d theta of one sequence that the engine drew, corrected; and the metrics of the correction."""
    theta = THETA.clone().requires_grad_()
    layout, hidden = batch_of(sequence)
    if kept is not None:
        layout = layout.with_kept_tokens([kept[PREFIXES.index(sequence[:t])] for t in range(LENGTH)])
    ends = [next(n for n in UNITS[level] if n > t) for t in range(LENGTH)]
    advantages = torch.stack([SIGNAL[sequence[:n]] for n in ends])
    old = step_logps(hidden @ THETA, layout).tokens
    rows = drawn.log_softmax(-1)
    sampling = torch.stack([rows[PREFIXES.index(sequence[:t]), sequence[t]] for t in range(LENGTH)])
    options, metrics = {"aggregation": "sum", "loss_type": loss_type}, {}
    if correction:
        found = rollout_correction(old, sampling, layout, **correction)
        options["importance_weights"], metrics = found.weights, found.metrics
    if loss_type != "reinforce":
        options["old"] = old
    if route == "linear":
        out = linear_step_policy_loss(hidden, theta.t(), layout, advantages, **options)
    elif route == "logits":
        out = step_policy_loss(hidden @ theta, layout, advantages, **options)
    else:
        out = policy_loss(step_logps(hidden @ theta, layout, backend="reference"), layout, advantages, **options)
    return torch.autograd.grad(out.loss, theta)[0], metrics


def expected_gradient(level, route, drawn, **options):
    """The mean over all sequences, by the engine's own probabilities."""
    total = torch.zeros_like(THETA)
    for sequence in SEQUENCES:
        p = logp_of(drawn, sequence).exp()
        if p > 0:
            total += p * gradient_of(sequence, level, route, drawn, **options)[0]
    return total


def exact_gradient(level, drawn, probability=lambda theta, tokens: logp_of(theta, tokens).exp()):
    """-d/d theta of the sum over units of E[signal]: a unit drawn by the trainer, what is before it by the engine."""
    theta = THETA.clone().requires_grad_()
    value = torch.zeros((), dtype=F64)
    for start, end in zip([0, *UNITS[level]], UNITS[level], strict=False):
        for tokens in itertools.product(range(TOKENS), repeat=end):
            before = tokens[:start]
            own = probability(theta, tokens) / probability(theta.detach(), before).clamp(min=1e-300)
            # the unit's probability after its prefix: a constant prefix, its gradient left out
            prefix = sum(
                (theta.log_softmax(-1)[PREFIXES.index(before[:t]), before[t]] for t in range(start)),
                torch.zeros((), dtype=F64),
            )
            own = own * torch.exp(prefix.detach() - prefix)
            value = value - logp_of(drawn, before).exp() * own * SIGNAL[tokens]
    return torch.autograd.grad(value, theta)[0]


@pytest.mark.parametrize("route", ["logits", "linear", "log-probs"])
@pytest.mark.parametrize("level", UNITS)
def test_untruncated_weights_are_unbiased(level, route):
    """Per level, the mean over all sequences is the exact gradient; without weights it is not."""
    exact = exact_gradient(level, ENGINE)
    for loss_type in POLICY_FORMULAS if route == "log-probs" else ["reinforce"]:
        options = {"mode": f"{level}_mask", "clip_max": None, "loss_type": loss_type}
        found = expected_gradient(level, route, ENGINE, **options)
        assert (found - exact).abs().max() < 1e-12, loss_type
    assert (expected_gradient(level, route, ENGINE) - exact).abs().max() > 0.05
    if level == "sequence":  # this one is the gradient of the trainer's own policy, whoever drew
        assert torch.allclose(exact, exact_gradient(level, THETA), rtol=0, atol=1e-15)
        assert (expected_gradient(level, route, THETA) - exact).abs().max() < 1e-12


@pytest.mark.parametrize("level", UNITS)
def test_bounds_cost_what_the_formula_says(level):
    """Bias = -E[(w - rho) signal d log pi]: what lies beyond the bound, summed over units by hand."""
    high, low = 1.2, 0.7
    for bound in ("truncate", "mask"):
        bias = torch.zeros_like(THETA)
        for start, end in zip([0, *UNITS[level]], UNITS[level], strict=False):
            for tokens in itertools.product(range(TOKENS), repeat=end):
                theta = THETA.clone().requires_grad_()
                own, engine = (logp_of(x, tokens) - logp_of(x, tokens[:start]) for x in (theta, ENGINE))
                rho = (own.detach() - engine).exp()
                if low <= rho <= high:
                    continue
                lost = {"truncate": (high if rho > high else low) - rho, "mask": -rho}[bound]
                score = torch.autograd.grad(own, theta)[0]
                bias -= logp_of(ENGINE, tokens).exp() * lost * SIGNAL[tokens] * score
        mode = {"mode": f"{level}_{bound}", "clip_max": high, "clip_min": low}
        found = expected_gradient(level, "linear", ENGINE, **mode)
        assert bias.abs().max() > 0.01
        assert (found - exact_gradient(level, ENGINE) - bias).abs().max() < 1e-12


def top_p_sets(table, top_p):
    """The smallest set of each row whose probabilities add up to top_p."""
    sets = []
    for row in table.softmax(-1):
        order = row.argsort(descending=True)
        before = row[order].cumsum(0) - row[order]
        sets.append(order[before < top_p].tolist())
    return sets


@pytest.mark.parametrize("route", ["logits", "linear"])
def test_top_p_is_the_gradient_of_the_policy_that_was_sampled(route):
    """With the kept tokens the mean is exact; with log-probs of the whole distribution the ratio is the kept mass."""
    sets = top_p_sets(THETA, 0.75)
    cut = torch.full_like(THETA, -torch.inf)
    for row, kept in enumerate(sets):
        cut[row, kept] = 0
    assert any(len(kept) == 2 for kept in sets) and any(len(kept) == 1 for kept in sets)
    drawn = THETA + cut

    theta = THETA.clone().requires_grad_()
    value = torch.zeros((), dtype=F64)
    for tokens in SEQUENCES:
        p = torch.ones((), dtype=F64)
        for t in range(LENGTH):
            row = PREFIXES.index(tokens[:t])
            if tokens[t] not in sets[row]:
                p = p * 0
                break
            whole = theta[row].softmax(-1)
            p = p * whole[tokens[t]] / whole[sets[row]].sum()
        value = value - p * SIGNAL[tokens]
    exact = torch.autograd.grad(value, theta)[0]

    found = expected_gradient("sequence", route, drawn, kept=sets)
    assert (found - exact).abs().max() < 1e-12
    assert (expected_gradient("sequence", route, drawn) - exact).abs().max() > 0.01
    # with the kept tokens there is no mismatch, without them there is: the mass that was kept
    for kept, same in ((sets, True), (None, False)):
        for tokens in SEQUENCES:
            if logp_of(drawn, tokens).isinf():
                continue
            _, metrics = gradient_of(tokens, "sequence", route, drawn, kept=kept, mode="token_mask", clip_max=None)
            masses = [THETA[PREFIXES.index(tokens[:t])].softmax(-1) for t in range(LENGTH)]
            mass = sum(m[sets[PREFIXES.index(tokens[:t])]].sum() for t, m in enumerate(masses)) / LENGTH
            want = 1.0 if same else mass.item()
            assert metrics["sampling/ratio/mean"].item() == pytest.approx(want, abs=1e-12)


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


def test_the_estimates_are_those_of_the_divergence():
    """On average k1 and k3 are KL(engine || trainer) of a token, and the ratio is 1."""
    names = ("sampling/kl_k1", "sampling/kl_k3", "sampling/ratio/mean")
    means = dict.fromkeys(names, 0.0)
    for sequence in SEQUENCES:
        _, metrics = gradient_of(sequence, "token", "logits", ENGINE, mode="token_truncate")
        for name in names:
            means[name] += (logp_of(ENGINE, sequence).exp() * metrics[name]).item()
    p, q = ENGINE.log_softmax(-1), THETA.log_softmax(-1)
    per_prefix = (p.exp() * (p - q)).sum(-1)
    kl = sum(logp_of(ENGINE, prefix).exp() * per_prefix[i] for i, prefix in enumerate(PREFIXES)) / LENGTH
    assert means["sampling/kl_k1"] == pytest.approx(kl.item(), abs=1e-12)
    assert means["sampling/kl_k3"] == pytest.approx(kl.item(), abs=1e-12)
    assert means["sampling/ratio/mean"] == pytest.approx(1.0, abs=1e-12)


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
