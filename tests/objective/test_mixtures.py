# SPDX-License-Identifier: Apache-2.0
"""Mixtures of losses over one pass: the sum of its parts on every route and backend, and what raises.

Mutations of sspo_ext/{terms,pair_spec,losses}.py, each caught by the test named (on a copy of the package):
  loss_weights ignored                       test_sum_of_its_parts
  a reference given to those who forbid it   test_sum_of_its_parts
  gradient of the first loss alone           test_sum_of_its_parts
  pair weights lost beside winner tokens     test_sum_of_its_parts
  dropped pairs counted in the token mean    test_sft_is_a_mean_over_tokens
"""
# ruff: noqa: E501 (a table of calls and their messages)

import pytest
import torch
from helpers.batch import random_batch, random_pairs

from sspo_ext.backends import ops
from sspo_ext.losses.criterion import StepPrefLoss
from sspo_ext.losses.pref import linear_step_pref_loss, step_pref_loss
from sspo_ext.objective.pair import LossTerm, pack_terms, unpack_terms

F64 = torch.float64
# names, weights, options of the call, which of them each part takes
CASES = {
    "one": (["hinge"], [0.7], {"beta": 0.3}, [{"beta": 0.3}]),
    "TRL's": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {"beta": 0.3}, [{"beta": 0.3}] * 3),
    "own betas": (["simpo", "sigmoid"], [1.0, -0.5], {}, [{}, {}]),
    "own options": (
        ["simpo", "discopop", "nll_rejected"],
        [1.0, 2.0, 0.1],
        {"simpo_gamma": 1.4, "discopop_tau": 0.2},
        [{"simpo_gamma": 1.4}, {"discopop_tau": 0.2}, {}],
    ),
    "smoothing": (
        ["robust", "hinge", "exo_pair"],
        [1.0, 1.0, 1.0],
        {"label_smoothing": 0.1},
        [{"label_smoothing": 0.1}, {}, {"label_smoothing": 0.1}],
    ),
    "3D-properties": (
        ["flex_dpo", "nll", "nll_rejected"],
        [1.0, 0.2, 0.05],
        {"beta": 0.2, "beta_rejected": 0.1},
        [{"beta": 0.2, "beta_rejected": 0.1}, {}, {}],
    ),
}
FORBIDDEN = {"simpo", "sft", "nll", "nll_rejected"}


def problem(seed=0, weighted=True):
    batch = random_batch(seed, V=17, weighted=weighted, dtype=F64)
    layout = batch.layout
    g = torch.Generator().manual_seed(seed)
    pairs = random_pairs(layout, seed, 8, weights=torch.rand(8, generator=g), margins=torch.rand(8, generator=g))
    ref = torch.randn(layout.num_steps, generator=g, dtype=F64) * 2
    hidden, head = torch.randn(4, 12, 6, generator=g, dtype=F64), torch.randn(17, 6, generator=g, dtype=F64)
    return hidden, head, layout, pairs, ref


@pytest.mark.parametrize("case", CASES)
def test_sum_of_its_parts(case, backend):
    """Loss, pair losses and gradients of each route are those of the parts, one call each, in float64."""
    names, weights, options, parts = CASES[case]
    hidden, head, layout, pairs, ref = problem()
    plain = pairs.with_values()
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    want, pair_losses = 0, 0
    logits = leaves[0] @ leaves[1].t()
    for name, weight, mine in zip(names, weights, parts, strict=True):
        own = {} if name in FORBIDDEN else {"ref": ref}
        takes = plain
        if name in ("sft", "nll", "nll_rejected"):  # has no margins
            takes = random_pairs(layout, 0, 8, weights=pairs.weights)
        out = step_pref_loss(logits, layout, takes, loss_type=name, backend="reference", **own, **mine)
        want, pair_losses = want + weight * out.loss, pair_losses + weight * out.pair_losses
    gradients = torch.autograd.grad(want, leaves)
    more = {"loss_type": names, "loss_weights": weights, "ref": ref, **options}
    for route in ("reference", "logits", "linear", "chunks", "frozen"):
        dtype = F64 if route == "reference" else torch.float32
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, head))
        name = "reference" if route == "reference" else backend
        if route in ("reference", "logits"):
            out = step_pref_loss(h @ w.t(), layout, pairs, backend=name, **more)
        else:
            w.requires_grad_(route != "frozen")
            budget = 3 * 17 * 4 if route == "chunks" else None
            out = linear_step_pref_loss(h, w, layout, pairs, backend=name, chunk_bytes=budget, **more)
        out.loss.backward()
        tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.loss.double(), want, **tight)
        torch.testing.assert_close(out.pair_losses.double(), pair_losses, **tight)
        torch.testing.assert_close(h.grad.double(), gradients[0], **tight)
        if route != "frozen":
            torch.testing.assert_close(w.grad.double(), gradients[1], **tight)
        assert out.term_losses.shape == (len(names), 8)


def test_one_pass(backend, monkeypatch):
    """The logits are read once forward and once backward, whatever the number of losses."""
    calls = {"token_logp_fwd": 0, "token_logp_bwd": 0, "step_loss_fwd": 0}
    for name in calls:
        real = getattr(ops, name)

        def counted(*args, name=name, real=real):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(ops, name, counted)
    hidden, head, layout, pairs, ref = problem()
    logits = (hidden @ head.t()).float().requires_grad_()
    step_pref_loss(logits, layout, pairs, ref=ref, loss_type=["sigmoid", "ipo", "sft"], backend=backend).loss.backward()
    assert calls == {"token_logp_fwd": 1, "token_logp_bwd": 1, "step_loss_fwd": 3}


def test_a_list_of_one_is_the_loss(backend):
    hidden, head, layout, pairs, ref = problem()
    logits = (hidden @ head.t()).float()
    want = step_pref_loss(logits, layout, pairs, ref=ref, loss_type="ipo", backend=backend)
    got = step_pref_loss(logits, layout, pairs, ref=ref, loss_type=["ipo"], backend=backend)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.pair_losses, want.pair_losses)
    assert got.metrics.keys() == want.metrics.keys()


def test_sft_is_a_mean_over_tokens(backend):
    """As TRL's: a pair counts by its winner's tokens, in the loss and in pair_losses, and not when it is dropped."""
    batch = random_batch(1)
    layout = batch.layout
    pairs = random_pairs(layout, 1, 9)
    assert 0 < pairs.num_valid < 9
    out = step_pref_loss(batch.logits, layout, pairs, loss_type="sft", backend=backend)
    winners = pairs.index[pairs.valid, 0].long()
    want = -out.step_logps[winners].sum() / layout.counts[winners].sum()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.pair_losses[pairs.valid].mean(), want)
    nll = step_pref_loss(batch.logits, layout, pairs, loss_type="nll", backend=backend).loss
    torch.testing.assert_close(nll, -(out.step_logps[winners] / layout.counts[winners]).mean())


def test_metrics_of_each_loss():
    hidden, head, layout, pairs, ref = problem()
    out = step_pref_loss(
        hidden @ head.t(), layout, pairs, ref=ref, loss_type=["sigmoid", "sft"], loss_weights=[1, 0.1], beta=0.4
    )
    alone = step_pref_loss(hidden @ head.t(), layout, pairs, ref=ref, beta=0.4)
    torch.testing.assert_close(out.metrics["loss/sigmoid"], alone.pair_losses[pairs.valid].mean())
    assert "loss/sft" in out.metrics and "loss/sigmoid" not in alone.metrics
    # rewards are those of the first
    torch.testing.assert_close(out.metrics["rewards/margins"], alone.metrics["rewards/margins"])


@pytest.mark.parametrize("first, other", [("cpo", "sigmoid"), ("simpo", "sigmoid"), ("sigmoid", "cpo")])
def test_rewards_are_the_first_losss(first, other):
    hidden, head, layout, pairs, ref = problem()
    logits = hidden @ head.t()
    want = step_pref_loss(logits, layout, pairs, loss_type=first, ref=ref if first == "sigmoid" else None)
    got = step_pref_loss(logits, layout, pairs, loss_type=[first, other], ref=ref, beta=want.beta)
    assert torch.equal(got.rewards, want.rewards) and (got.rewards != 0).any()


def test_module():
    hidden, head, layout, pairs, ref = problem()
    module = StepPrefLoss(["sigmoid", "simpo"], loss_weights=[1.0, 0.5], simpo_gamma=1.0)
    want = step_pref_loss(
        hidden @ head.t(), layout, pairs, ref=ref, loss_type=["sigmoid", "simpo"], loss_weights=[1.0, 0.5],
        simpo_gamma=1.0,
    )  # fmt: skip
    assert torch.equal(module(hidden @ head.t(), layout, pairs, ref=ref).loss, want.loss)
    with pytest.raises(TypeError, match="slic_delta"):
        StepPrefLoss(["sigmoid", "simpo"], slic_delta=1.0)
    with pytest.raises(ValueError, match="loss_weights: expected 2 numbers"):
        StepPrefLoss(["sigmoid", "simpo"], loss_weights=[1.0])


def test_terms_survive_packing():
    terms = (
        LossTerm("simpo", (2.0, 0.5), 0.9, -1.5, ref=False),
        LossTerm("sft", (0.1,), by_winner_tokens=True, margins=False, soft_labels=False, ref=False),
        LossTerm("sigmoid", (0.1,), soft_labels=False),
    )
    assert tuple(unpack_terms(*pack_terms(terms))) == terms


BAD = {
    "empty": ({"loss_type": []}, TypeError, "loss_type: expected a name or a list of names"),
    "not names": ({"loss_type": ["sigmoid", 1]}, TypeError, "loss_type: expected a name or a list of names"),
    "twice": ({"loss_type": ["ipo", "ipo"]}, ValueError, "loss_type: expected every name once"),
    "unknown": ({"loss_type": ["ipo", "sigma"]}, ValueError, "loss_type: expected one of .*got 'sigma'"),
    "too few": ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, ValueError, "loss_weights: expected 2 numbers"),
    "weights of one": ({"loss_weights": [1.0]}, ValueError, "loss_weights: expected None beside one loss_type"),
    "infinite": ({"loss_type": ["ipo"], "loss_weights": [float("inf")]}, ValueError, "loss_weights: expected a finite number"),
    "bool": ({"loss_type": ["ipo"], "loss_weights": [True]}, TypeError, "loss_weights: expected a number"),
    "nobody's option": (
        {"loss_type": ["ipo", "hinge"], "simpo_gamma": 1.0}, TypeError, r"simpo_gamma: .*\['ipo', 'hinge'\]"
    ),
    "nobody's reference": ({"loss_type": ["simpo", "sft"]}, ValueError, r"ref: loss_type \['simpo', 'sft'\] is reference"),
    "nobody's smoothing": (
        {"loss_type": ["ipo", "hinge"], "label_smoothing": 0.1}, ValueError, r"label_smoothing: loss_type \['ipo', 'hinge'\]"
    ),
    "nobody's margins": ({"loss_type": ["nca_pair", "sft"], "margins": torch.ones(8)}, ValueError, "margins: loss_type"),
    "margins": ({"loss_type": "apo_zero", "margins": torch.ones(8)}, ValueError, "margins: loss_type 'apo_zero' does not"),
    "no reference": ({"loss_type": ["sft", "nca_pair"], "ref": None}, ValueError, "ref: loss_type 'nca_pair' needs a ref"),
    "exo without": ({"loss_type": "exo_pair"}, ValueError, "label_smoothing: loss_type 'exo_pair' needs a number above 0"),
    "robust soft": (
        {"loss_type": "robust", "soft_labels": torch.ones(8)}, ValueError, "soft_labels: loss_type 'robust' does not have it"
    ),
    "option's limit": ({"loss_type": ["ipo", "discopop"], "discopop_tau": 2.0}, ValueError, "discopop_tau: .*'discopop'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_messages(case):
    options, error, match = BAD[case]
    hidden, head, layout, _, ref = problem()
    pairs = random_pairs(layout, 0, 8)
    with pytest.raises(error, match=match):
        step_pref_loss(hidden @ head.t(), layout, pairs, **{"ref": ref, **options})


def test_compiles_without_a_break(backend):
    hidden, head, layout, pairs, ref = problem()
    h, w = hidden.float().requires_grad_(), head.float()

    def loss(h):
        return linear_step_pref_loss(
            h, w, layout, pairs, ref=ref, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], backend=backend
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(h)
    assert torch.equal(compiled, loss(h))
