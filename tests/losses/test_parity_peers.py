# SPDX-License-Identifier: Apache-2.0
"""Against independent authors, where their packages are installed. One step per sequence is what they compute.

Where they differ from us on purpose:
  TRL `sigmoid` and `hinge` ignore label_smoothing; ours smooths sigmoid, and hinge refuses it.
  TRL `ipo` divides by completion_mask.sum(), the unshifted count: one more than the scored tokens only if the mask
  covers a sequence's first token, which a prompt prevents. Liger refuses ipo.
  Liger's losses are sums over pairs divided by the number of pairs: our reduction="mean" when no pair is dropped.

Mutations, each caught by the test named (on a copy of the package):
  ipo of sums                     test_loss_gradient_and_metrics_equal_trl
  hinge squared                   test_loss_gradient_and_metrics_equal_trl
  rewards without beta (metrics)  test_loss_gradient_and_metrics_equal_trl
  reference sums added            test_loss_gradient_and_metrics_equal_trl
  simpo's gamma times beta        test_simpo_equals_its_formula_as_trl_writes_it
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.batch import random_batch
from helpers.parity import sequences, trl_dpo

from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss

F64 = torch.float64


def test_token_log_probs_equal_trl(backend):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    logits, input_ids, mask, layout, _ = sequences()
    want = utils.selective_log_softmax(logits[:, :-1].double(), input_ids[:, 1:])
    got = step_logps(logits, layout, backend=backend)
    torch.testing.assert_close(got.tokens.double(), want[mask[:, 1:]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sums.double(), (want * mask[:, 1:]).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_loss_gradient_and_metrics_equal_trl(backend, loss_type):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    logits, input_ids, mask, layout, ref = sequences(dtype=F64)
    leaf = logits.clone().requires_grad_()
    per_token = utils.selective_log_softmax(leaf[:, :-1], input_ids[:, 1:]) * mask[:, 1:]
    want, metrics = trl_dpo(loss_type, per_token, mask, input_ids, ref, 0.3)
    want.backward()
    for name, dtype in (("reference", F64), (backend, torch.float32)):
        ours = logits.detach().to(dtype, copy=True).requires_grad_()
        out = step_pref_loss(ours, layout, ref=ref, loss_type=loss_type, beta=0.3, backend=name)
        out.loss.backward()
        tight = dtype == F64
        assert out.loss.item() == pytest.approx(want.item(), rel=1e-12 if tight else 1e-5)
        torch.testing.assert_close(
            ours.grad.to(F64), leaf.grad, rtol=1e-10 if tight else 1e-4, atol=1e-12 if tight else 1e-6
        )
        assert {k: out.metrics[k].item() for k in metrics} == pytest.approx(metrics, rel=1e-6)
    assert len(metrics) == 6


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_loss_equals_liger(backend, loss_type):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss", reason="liger-kernel is not installed")
    logits, input_ids, mask, layout, ref = sequences(1)
    sums = (logits.double().log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)
    B = len(sums) // 2

    # not ipo: it needs token counts, which Liger does not hand to its losses, and refuses
    want = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        sums[:B], sums[B:], input_ids, ref[:B].double(), ref[B:].double(), beta=0.3, loss_type=loss_type
    )
    want = (want[0] if isinstance(want, tuple) else want).item()
    got = step_pref_loss(logits, layout, ref=ref, loss_type=loss_type, beta=0.3, backend=backend)
    assert got.loss.item() == pytest.approx(want, rel=1e-5)


def test_simpo_equals_its_formula_as_trl_writes_it(backend):
    """TRL's CPOTrainer: x = mean_w - mean_l - gamma / beta; loss = -ls(beta x) (1 - e) - ls(-beta x) e."""
    logits, input_ids, mask, layout, _ = sequences(2)
    per_token = logits.double().log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    means = per_token.sum(1) / mask[:, 1:].sum(1)
    beta, gamma, e = 2.5, 1.4, 0.1
    z = means[:3] - means[3:] - gamma / beta
    want = (-F.logsigmoid(beta * z) * (1 - e) - F.logsigmoid(-beta * z) * e).mean().item()
    options = {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "label_smoothing": e}
    for name in ("reference", backend):
        got = step_pref_loss(logits, layout, backend=name, **options)
        assert got.loss.item() == pytest.approx(want, rel=1e-5)


def test_dpo_golden_of_torchtune():
    """torchtune's test_dpo_loss.py gives sums and expects these losses: beta .1, label smoothing 0, one pair at a time.

    policy chosen [-.5, -10, -1], rejected [-.1, -30, -21]; reference chosen [-.5, -10.1, -.1], rejected [-.1, -20.1,
    -.1].
    log-ratios: 0, .1 - (-9.9) = 10, -.9 - (-20.9) = 20. Losses ln 2, log(1 + e^-1), log(1 + e^-2).
    """
    from sspo_ext.backends import reference

    sums = torch.tensor([-0.5, -10.0, -1.0, -0.1, -30.0, -21.0], dtype=F64)
    ref = torch.tensor([-0.5, -10.1, -0.1, -0.1, -20.1, -0.1], dtype=F64)
    index, counts = torch.tensor([[0, 3], [1, 4], [2, 5]]), torch.ones(6, dtype=torch.int64)
    losses = reference.pair_losses(sums, counts, ref, index, None, None, "sigmoid", [0.1], 1.0)
    assert losses.tolist() == pytest.approx([0.6931471805599453, 0.31326168751822286, 0.12692801104297263], rel=1e-12)


def test_step_dpo_is_dpo_on_the_step():
    """Step-DPO (2406.18629): the shared prefix is prompt, the step after it is the whole completion."""
    batch = random_batch(0, B=2, T=10, dtype=F64)
    ids = torch.full((2, 10), -1)
    ids[0, 4:7], ids[1, 4:9] = 0, 0
    batch.labels = torch.randint(0, 11, (2, 10), generator=torch.Generator().manual_seed(0))
    out = step_pref_loss(batch.logits, batch.labels, ids, beta=0.4, backend="reference")
    lp = batch.logits.log_softmax(-1)[:, :-1].gather(-1, batch.labels[:, 1:, None]).squeeze(-1)
    want = -F.logsigmoid(0.4 * (lp[0, 3:6].sum() - lp[1, 3:8].sum()))
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-13)
