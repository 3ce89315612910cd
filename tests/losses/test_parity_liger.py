# SPDX-License-Identifier: Apache-2.0
"""Every loss that Liger has too: its code as the oracle, loss and gradient with autograd in float64.

Where it differs from us, on purpose:
  ipo                Liger refuses it for want of counts.
  bco_pair           no reward shift in Liger. Ours takes a shift.
  cpo, simpo, orpo   Liger averages the likelihood over all chosen tokens: compared as mixtures with `sft`.
"""

import pytest
import torch
from helpers.parity import (
    LIGER,
    gap,
    liger_linear,
    record,
    sequences,
)

from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.losses.unpaired import kto_loss

LIGER_PAIRS = {
    "sigmoid": {}, "hinge": {}, "exo_pair": {"label_smoothing": 0.2}, "nca_pair": {},
    "robust": {"label_smoothing": 0.2}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {}, "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
}  # fmt: skip
LIGER_REFERENCE_FREE = {
    "cpo": ("CPO", {"alpha": 0.7, "label_smoothing": 0.1}, {"cpo_alpha": 0.0, "label_smoothing": 0.1}, {"sft": 0.7}),
    "simpo": ("SimPO", {"alpha": 0.7, "gamma": 0.4}, {"simpo_gamma": 0.4}, {"sft": 0.7}),
    "orpo": ("ORPO", {}, {}, {"nll": -1.0, "sft": 1.0}),
}


def liger_problem(seed):
    g = torch.Generator().manual_seed(seed)
    _, input_ids, mask, layout, _ = sequences(seed)
    hidden, ref_hidden = (torch.randn(6, 15, 7, generator=g) for _ in range(2))
    return hidden, ref_hidden * 0.3 + hidden * 0.9, torch.randn(23, 7, generator=g), input_ids, mask, layout


def held_against_liger(name, want, peer_grads, hidden, weight, layout, note, **options):
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    out = linear_step_pref_loss(h, w, layout, backend="reference", **options)
    out.loss.backward()
    gradient = max(gap(h.grad, peer_grads[0]), gap(w.grad, peer_grads[1]))
    # float32: what it may be off by grows with the numbers; what is recorded is absolute
    scale = max(h.grad.abs().max().item(), w.grad.abs().max().item(), abs(out.loss.item()), 1.0)
    record(name, LIGER, gap(out.loss, want), gradient, 1e-5 * scale, note)


@pytest.mark.parametrize("name", LIGER_PAIRS)
def test_pair_loss_equals_liger(name):
    hidden, ref_hidden, weight, input_ids, mask, layout = liger_problem(20)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = liger_linear("DPO", *leaves, input_ids, mask, ref_hidden, beta=0.3, loss_type=name, **LIGER_PAIRS[name])
    grads = torch.autograd.grad(want, leaves)
    ref = step_logps((ref_hidden @ weight.t()).double(), layout).sums
    held_against_liger(
        name, want, grads, hidden, weight, layout, "float32", ref=ref, loss_type=name, beta=0.3, **LIGER_PAIRS[name]
    )


@pytest.mark.parametrize("name", LIGER_REFERENCE_FREE)
def test_reference_free_equals_liger(name):
    which, settings, options, mixed = LIGER_REFERENCE_FREE[name]
    hidden, _, weight, input_ids, mask, layout = liger_problem(21)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = liger_linear(which, *leaves, input_ids, mask, beta=0.3, **settings)
    held_against_liger(
        name, want, torch.autograd.grad(want, leaves), hidden, weight, layout, "float32, with sft", beta=0.3,
        loss_type=[name, *mixed], loss_weights=[1.0, *mixed.values()], **options,
    )  # fmt: skip


def test_kto_equals_liger():
    module = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, ref_hidden, weight, input_ids, mask, layout = liger_problem(22)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    desirable, z0 = torch.tensor([True, False, True, True, False, True]), torch.tensor(0.4)
    loss = module.LigerFusedLinearKTOLoss(beta=0.3, compiled=False, use_ref_model=True)
    out = loss(
        leaves[0][:, :-1].contiguous(), leaves[1], input_ids.masked_fill(~mask, -100)[:, 1:],
        preference_labels=desirable, ref_input=ref_hidden[:, :-1].contiguous(), ref_weight=weight, kl=z0,
    )  # fmt: skip
    want = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(want, leaves)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    ref = step_logps((ref_hidden @ weight.t()).double(), layout).sums
    mine = kto_loss(step_logps(h @ w.t(), layout), layout, desirable, ref=ref, reference_point=z0, beta=0.3)
    mine.loss.backward()
    record("kto", LIGER, gap(mine.loss, want), max(gap(h.grad, grads[0]), gap(w.grad, grads[1])), 1e-5, "float32")
