# SPDX-License-Identifier: Apache-2.0
"""What importance weights and kept tokens are unbiased for: expectations over all sequences of a toy.

It has three tokens, sequences of three, and tables of probabilities for the trainer and the engine, so that every
expectation is a sum over 27 sequences. On the linear route the hidden states name the prefix and the head is the table.

Mutations, each caught by the test named:
  a sum over the level that is not whole      test_untruncated_weights_are_unbiased
  weights left out                            test_untruncated_weights_are_unbiased
  a masked ratio left at the bound            test_bounds_cost_what_the_formula_says
  sets of kept tokens left out of the loss    test_top_p_is_the_gradient_of_the_policy_that_was_sampled
  KL(trainer || engine)                       test_the_estimates_are_those_of_the_divergence
"""

import itertools

import pytest
import torch
from helpers.policy import F64

from sspo_ext import StepLayout, linear_step_policy_loss, policy_loss, step_logps, step_policy_loss
from sspo_ext.formulas.policy import POLICY_FORMULAS
from sspo_ext.losses import rollout_correction

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
