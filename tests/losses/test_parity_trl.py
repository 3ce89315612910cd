# SPDX-License-Identifier: Apache-2.0
"""Every loss that TRL has too: its code as the oracle, loss and gradient with autograd in float64.

Where it differs from us or from the paper, on purpose:
  sigmoid, hinge     TRL ignores label_smoothing for both; ours smooths sigmoid, and hinge refuses it.
  ipo                TRL divides by token counts and says that the authors confirmed it; the paper's equation has sums
                     (`ipo_sum`). TRL's CPOTrainer has means too.
  bco_pair           no reward shift in TRL; its documentation prints DPO's formula. Ours takes a shift.
  discopop           TRL's product of a sigmoid and an exponential overflows in float32 below z = -89 (tested here).
  alpha divergence   TRL's code has no float64 (a KeyError): compared in float32. Its exponents are held at 80, as ours;
                     its forward KL's are not, so that u = -100 gives it an infinite loss in float32 (tested here).
  f-divergences      TRL's rewards in the metrics stay beta times the log-ratio; so do ours.
  sft                TRL's is a mean over all chosen tokens; so is ours. `nll` is a mean over responses.
  cpo, simpo, orpo   TRL averages the likelihood over all chosen tokens: compared as mixtures with `sft`. Its ORPO has
                     prompt tokens in it: its odds-ratio term alone is compared.
  kto                TRL takes the mean of each rank's mean for z0, ours weighs ranks by their sequences.
"""

import pytest
import torch
from helpers.parity import (
    F64,
    TRL,
    gap,
    record,
    sequences,
    token_logps,
    trl_dpo,
    trl_kto,
    trl_module,
    trl_reference_free,
    trl_tpo,
)

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.lists import tpo_l_loss, tpo_loss
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import linear_step_pref_loss, pref_loss, step_pref_loss
from sspo_ext.losses.token_weights import ld_dpo_weights
from sspo_ext.losses.tokens import wpo_weights
from sspo_ext.losses.transport import aot_loss, aot_unpaired_loss
from sspo_ext.losses.unpaired import apo_zero_unpaired_loss, kto_loss, kto_reference_point

# our loss -> (TRL's loss type, its settings, our options)
PAIRS = {
    "sigmoid": ("sigmoid", {}, {}),
    "hinge": ("hinge", {}, {}),
    "ipo": ("ipo", {}, {}),
    "sigmoid_norm": ("sigmoid_norm", {}, {}),
    "robust": ("robust", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "nca_pair": ("nca_pair", {}, {}),
    "bco_pair": ("bco_pair", {}, {}),
    "sppo_hard": ("sppo_hard", {}, {}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {"tau": 0.3}, {"discopop_tau": 0.3}),
    "sft": ("sft", {}, {}),
    "sigmoid_forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}, {}),
    "sigmoid_js_divergence": ("sigmoid", {"f_divergence_type": "js_divergence"}, {}),
    "sigmoid_alpha_divergence": (
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        {"f_alpha_divergence_coef": 0.4},
    ),
}


def near_sums(logits, layout, seed):
    """A reference whose log-ratios are of order 1, so that exponentials of them have digits to compare."""
    sums = step_logps(logits.to(F64), layout, backend="reference").sums
    return sums + torch.randn(len(sums), generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("name", PAIRS)
def test_pair_loss_equals_trl(name, backend):
    trl_type, settings, options = PAIRS[name]
    logits, input_ids, mask, layout, _ = sequences(3, dtype=F64)
    ref = near_sums(logits, layout, 0)
    dtype = torch.float32 if name == "sigmoid_alpha_divergence" else F64
    leaf = logits.to(dtype, copy=True).requires_grad_()
    want, _ = trl_dpo(trl_type, token_logps(leaf, input_ids, mask), mask, input_ids, ref.to(dtype), 0.3, **settings)
    want.backward()
    ours = {"ref": None if name == "sft" else ref, "loss_type": name, "beta": 0.3, **options}
    mine = logits.clone().requires_grad_()
    out = step_pref_loss(mine, layout, backend="reference", **ours)
    out.loss.backward()
    note = {"sigmoid_alpha_divergence": "float32", "exo_pair": "its epsilon is float32"}.get(name, "")
    limit = {"sigmoid_alpha_divergence": 1e-5, "exo_pair": 1e-7}.get(name, 1e-12)
    record(name, TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), limit, note)
    fused = logits.float().requires_grad_()
    got = step_pref_loss(fused, layout, backend=backend, **ours)
    got.loss.backward()
    torch.testing.assert_close(got.loss.double(), out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad.double(), mine.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["logits", "linear"])
def test_mixture_equals_trl(route, backend):
    """TRL's spelling: loss_type=[...], loss_weights=[...]. Each takes what it has; sft has no reference."""
    names, weights = ["sigmoid", "sft", "bco_pair", "robust"], [1.0, 0.3, -0.2, 0.7]
    g = torch.Generator().manual_seed(4)
    _, input_ids, mask, layout, _ = sequences(4)
    hidden, head = torch.randn(6, 15, 7, generator=g, dtype=F64), torch.randn(23, 7, generator=g, dtype=F64)
    ref = near_sums(hidden @ head.t(), layout, 1)
    settings = {"beta": 0.4, "label_smoothing": 0.1}
    leaf, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = leaf @ weight.t()
    # TRL's sigmoid has no smoothing; its robust has: what label_smoothing adds to ours is taken off by hand
    per_token = token_logps(logits, input_ids, mask)
    want, _ = trl_dpo(names[1:], per_token, mask, input_ids, ref, loss_weights=weights[1:], **settings)
    want.backward()
    options = {"ref": ref, "loss_type": names[1:], "loss_weights": weights[1:], **settings}
    for name, dtype in (("reference", F64), (backend, torch.float32)):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, head))
        if route == "linear":
            out = linear_step_pref_loss(h, w, layout, backend=name, **options)
        else:
            out = step_pref_loss(h @ w.t(), layout, backend=name, **options)
        out.loss.backward()
        if dtype == F64:
            limit = 1e-12
            record(
                "mixtures",
                TRL,
                gap(out.loss, want),
                max(gap(h.grad, leaf.grad), gap(w.grad, weight.grad)),
                limit,
                route,
            )
        else:
            torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(h.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(w.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fn", [aot_loss, aot_unpaired_loss])
def test_aot_equals_trl(fn):
    logits, input_ids, mask, layout, _ = sequences(5, B=10, dtype=F64)
    ref = near_sums(logits, layout, 2) * 1.3
    name = fn.__name__.removesuffix("_loss")
    leaf = logits.clone().requires_grad_()
    want, _ = trl_dpo(name, token_logps(leaf, input_ids, mask), mask, input_ids, ref, 0.2, label_smoothing=0.1)
    want.backward()
    mine = logits.clone().requires_grad_()
    out = fn(step_logps(mine, layout), layout, ref=ref, beta=0.2, label_smoothing=0.1)
    out.loss.backward()
    record(name, TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired_equals_trl(name):
    logits, input_ids, mask, layout, _ = sequences(6, dtype=F64)
    mismatched = sequences(7, dtype=F64)[0]
    ref, kl_ref = near_sums(logits, layout, 3), near_sums(mismatched, layout, 4) - 1.0
    desirable = torch.tensor([True, False, True, True, False, True])
    leaf = logits.clone().requires_grad_()
    want = trl_kto(
        name, token_logps(leaf, input_ids, mask), token_logps(mismatched, input_ids, mask), mask, input_ids, desirable,
        ref, kl_ref, 0.3, (1.0, 1.4),
    )  # fmt: skip
    want.backward()
    mine = logits.clone().requires_grad_()
    logps, options = step_logps(mine, layout), {"ref": ref, "beta": 0.3, "undesirable_weight": 1.4}
    if name == "kto":
        z0 = kto_reference_point(step_logps(mismatched, layout), layout, kl_ref)
        assert z0 > 0
        out = kto_loss(logps, layout, desirable, reference_point=z0, **options)
    else:
        out = apo_zero_unpaired_loss(logps, layout, desirable, **options)
    out.loss.backward()
    record(name, TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12)


# our mixture -> (TRL's trainer, its settings, ours)
REFERENCE_FREE = {
    "cpo": ("CPO", {"loss_type": "sigmoid", "simpo_gamma": 0.0}, {"cpo_alpha": 0.0}, "with sft for its likelihood"),
    "simpo": ("CPO", {"loss_type": "simpo", "simpo_gamma": 0.7}, {"simpo_gamma": 0.7}, "CPO-SimPO, with sft"),
    "slic": ("CPO", {"loss_type": "hinge", "simpo_gamma": 0.0}, {"slic_delta": 1.0}, "CPO's hinge, with sft"),
}


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_reference_free_equals_trl(name):
    which, settings, options, note = REFERENCE_FREE[name]
    logits, input_ids, mask, layout, _ = sequences(8, dtype=F64)
    leaf, smoothing = logits.clone().requires_grad_(), 0.0 if name == "slic" else 0.1
    want, _ = trl_reference_free(
        which, leaf, input_ids, mask, alpha=0.0, beta=0.6, cpo_alpha=0.8, label_smoothing=smoothing, **settings
    )
    want.backward()
    mine = logits.clone().requires_grad_()
    out = step_pref_loss(
        mine, layout, backend="reference", loss_type=[name, "sft"], loss_weights=[1.0, 0.8], beta=0.6,
        label_smoothing=smoothing, **options,
    )  # fmt: skip
    out.loss.backward()
    record(name, TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12, note)


def test_orpo_equals_trl():
    logits, input_ids, mask, layout, _ = sequences(9)
    leaf = logits.clone().requires_grad_()
    want, metrics = trl_reference_free("ORPO", leaf, input_ids, mask, beta=0.6)
    (gradient,) = torch.autograd.grad(want - _orpo_nll(leaf, input_ids, layout), leaf)
    mine = logits.double().requires_grad_()
    out = step_pref_loss(
        mine, layout, backend="reference", loss_type=["orpo", "nll"], loss_weights=[1.0, -1.0], beta=0.6
    )
    out.loss.backward()
    theirs = want - metrics["nll_loss"]
    record("orpo", TRL, gap(out.loss, theirs), gap(mine.grad, gradient), 1e-5, "odds-ratio term, float32")


def _orpo_nll(logits, input_ids, layout):
    """TRL's likelihood term of ORPO: the mean over every token of the chosen sequences, prompts too."""
    half = len(input_ids) // 2
    logps = logits[:half, :-1].log_softmax(-1).gather(-1, input_ids[:half, 1:, None])
    return -logps.mean()


@pytest.mark.parametrize("name", ["tpo", "tpo_l"])
def test_tpo_equals_trl(name):
    logits, input_ids, mask, layout, _ = sequences(10, B=9, dtype=F64)
    leaf = logits.clone().requires_grad_()
    trl_type = {"tpo": "sigmoid", "tpo_l": "tpo-l"}[name]
    scored = leaf.masked_fill(~mask.roll(-1, 1)[..., None], 0.0)  # nothing is scored there; a mask keeps gradients out
    want = trl_tpo(
        trl_type, torch.where(mask.roll(-1, 1)[..., None], leaf, scored), input_ids, mask, 0.4, 0.3, 0.7, 0.1
    )
    want.backward()
    mine = logits.clone().requires_grad_()
    pairs, gold = torch.tensor([[0, 3], [1, 4], [2, 5]]), torch.tensor([6, 7, 8])
    options = {"beta": 0.4, "tpo_alpha": 0.7, "label_smoothing": 0.1}
    logps = step_logps(mine, layout)
    if name == "tpo":
        out = tpo_loss(logps, layout, pairs, gold, **options)
    else:
        out = tpo_l_loss(logps, layout, pairs, gold, tpo_l_gamma=0.3, **options)
    out.loss.backward()
    record(name, TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12)


def test_wpo_equals_trl():
    logits, input_ids, mask, layout, _ = sequences(11, dtype=F64)
    logits = 0.2 * logits  # near uniform, so that the weights are of order 1
    ref = near_sums(logits, layout, 5)
    leaf = logits.clone().requires_grad_()
    squares = leaf.detach()[:, :-1].softmax(-1).square().sum(-1).log()
    want, _ = trl_dpo(
        "sigmoid", token_logps(leaf, input_ids, mask), mask, input_ids, ref, 0.3, use_weighting=True, log_sum_sq=squares
    )
    want.backward()
    mine = logits.clone().requires_grad_()
    logps = step_logps(mine, layout, sum_p2=True)
    weights = wpo_weights(logps, layout)
    assert weights.min() > 0.05
    out = pref_loss(logps, layout, ref=ref, beta=0.3, weights=weights)
    out.loss.backward()
    record("WPO", TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ld_dpo_equals_trl(alpha):
    logits, input_ids, mask, _, _ = sequences(12, dtype=F64)
    labels = input_ids.masked_fill(~mask, -100)
    layout = StepLayout.from_step_ids(
        labels, torch.where(mask, 0, -1), token_weights=ld_dpo_weights(labels, alpha).double()
    )
    ref_logits = sequences(13, dtype=F64)[0]
    ref = step_logps(ref_logits, layout, backend="reference")
    leaf = logits.clone().requires_grad_()
    want, _ = trl_dpo("sigmoid", token_logps(leaf, input_ids, mask), mask, input_ids, ref.sums, 0.1, ld_alpha=alpha)
    want.backward()
    mine = logits.clone().requires_grad_()
    out = step_pref_loss(mine, layout, ref=ref, backend="reference")
    out.loss.backward()
    record("LD-DPO", TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-7, f"alpha {alpha:g}, weights float32")


def test_trl_overflows_where_we_do_not():
    """float32: TRL's discopop is NaN at z = -100, its forward KL infinite at u = -100."""
    trl_module("trl.trainer.dpo_trainer")
    input_ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[False, True, True]] * 2)
    layout = StepLayout.from_step_ids(input_ids.masked_fill(~mask, -100), torch.where(mask, 0, -1))
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    sums = step_logps(logits.detach(), layout).sums
    ref = sums + torch.tensor([100.0, 0.0])
    per_token = token_logps(logits, input_ids, mask)
    for name, settings, ours in (
        ("discopop", {}, "discopop"),
        ("sigmoid", {"f_divergence_type": "forward_kl"}, "sigmoid_forward_kl"),
    ):
        theirs, _ = trl_dpo(name, per_token, mask, input_ids, ref, 1.0, **settings)
        assert not theirs.isfinite()
        out = step_pref_loss(logits, layout, ref=ref, beta=1.0, loss_type=ours)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["sigmoid", "sft"], ["apo_down"]])
def test_end_to_end_equals_trl(loss_type):
    utils = trl_module("trl.trainer.utils")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    g = torch.Generator().manual_seed(0)
    _, _, mask, _, _ = sequences(14)
    input_ids = torch.randint(0, 29, mask.shape, generator=g)
    layout = StepLayout.from_step_ids(input_ids.masked_fill(~mask, -100), torch.where(mask, 0, -1))
    with torch.no_grad():
        ref = near_sums(model(input_ids).logits, layout, 6)
    labels, weights = input_ids.masked_fill(~mask, -100), [1.0, 0.3][: len(loss_type)]

    hidden = model.model(input_ids).last_hidden_state
    out = linear_step_pref_loss(
        hidden, model.lm_head.weight, layout, ref=ref, loss_type=loss_type, loss_weights=weights, beta=0.2
    )
    out.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    utils.add_fused_lm_head(model)
    per_token = model(input_ids=input_ids, labels=labels, fused_lm_head=True).log_probs[:, -(input_ids.shape[1] - 1) :]
    want, metrics = trl_dpo(loss_type, per_token, mask, input_ids, ref, 0.2, loss_weights=weights)
    want.backward()
    worst = max(gap(ours[name], p.grad) for name, p in model.named_parameters())
    assert max(g.abs().max().item() for g in ours.values()) > 1e-3
    record("end to end", TRL, gap(out.loss, want), worst, 1e-5, "+".join(loss_type))
    assert {k: out.metrics[k].item() for k in metrics} == pytest.approx(metrics, rel=1e-5)
