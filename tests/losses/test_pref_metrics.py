# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss: metrics and rewards; StepPrefLoss, the module; what is returned.

Mutations, each caught by the test named (on a copy of the package):
  ties count as accurate                   test_equal_rewards_are_not_accurate
  rewards without beta                     test_metrics_by_hand
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import pytest
import torch
from helpers.batch import oracle_steps, random_batch
from helpers.pref import F64

from sspo_ext.losses.criterion import StepPrefLoss
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.objective.sums import StepLogps


def test_metrics_by_hand():
    """Probabilities 1/8, 2/8, 5/8 everywhere; beta 0.5, reference sums given; chosen sequence 0, rejected sequence 1.

    step 0: chosen labels 2, 2 -> S = 2 ln(5/8); rejected 0, 1 -> ln(1/8) + ln(2/8). step 1: chosen 0 -> ln(1/8);
    rejected 2 -> ln(5/8).
    step 2: chosen 1 -> ln(2/8); rejected has none: dropped.
    """
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=F64).log().repeat(2, 5, 1)
    labels = torch.tensor([[0, 2, 2, 0, 1], [0, 0, 1, 2, -100]])
    ids = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 0, 1, 2]])
    ref = torch.tensor([-1.0, -2.0, -7.0, -3.0, -0.25, -9.0], dtype=F64)
    out = step_pref_loss(logits, labels, ids, ref=ref, beta=0.5, backend="reference")
    a, b, c = math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)
    w0, w1, l0, l1 = 2 * c, a, a + b, c
    r_w, r_l = [0.5 * (w0 + 1), 0.5 * (w1 + 2)], [0.5 * (l0 + 3), 0.5 * (l1 + 0.25)]
    want = {
        "rewards/chosen": sum(r_w) / 2,
        "rewards/rejected": sum(r_l) / 2,
        "rewards/margins": (sum(r_w) - sum(r_l)) / 2,
        "rewards/accuracies": sum(x > y for x, y in zip(r_w, r_l, strict=True)) / 2,
        "logps/chosen": (w0 + w1) / 2,
        "logps/rejected": (l0 + l1) / 2,
        "steps/logps": (w0 + w1 + b + l0 + l1) / 5,
        "steps/tokens": 7 / 5,
        "steps/count": 5,
        "steps/empty": 1,
        "pairs/count": 2,
        "pairs/dropped": 1,
    }
    got = {k: v.item() for k, v in out.metrics.items()}
    assert got == pytest.approx(want, rel=1e-6)
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in out.metrics.values())
    assert out.rewards.tolist() == pytest.approx(
        [0.5 * (s - r) for s, r in zip([w0, w1, b, l0, l1, 0], ref.tolist(), strict=True)]
    )


def test_rewards_of_per_token_losses():
    """simpo rewards are beta * S / n, as in TRL's CPOTrainer; ipo keeps beta * u, as in TRL's DPOTrainer."""
    batch = random_batch(1, dtype=F64)
    layout = batch.layout
    sums, counts, _ = oracle_steps(batch)
    simpo = step_pref_loss(batch.logits, layout, loss_type="simpo", beta=2.0, backend="reference").rewards
    assert simpo.tolist() == pytest.approx([2.0 * s / max(n, 1) for s, n in zip(sums.tolist(), counts, strict=True)])
    ipo = step_pref_loss(batch.logits, layout, loss_type="ipo", beta=0.3, backend="reference").rewards
    assert ipo.tolist() == pytest.approx((0.3 * sums).tolist())


def test_equal_rewards_are_not_accurate():
    batch = random_batch(1)
    batch.logits[2:] = batch.logits[:2]
    batch.labels[2:], batch.step_ids[2:] = batch.labels[:2], batch.step_ids[:2]
    out = step_pref_loss(batch.logits, batch.layout, backend="reference")
    assert out.metrics["rewards/accuracies"] == 0 and out.metrics["rewards/margins"] == 0
    assert out.loss.item() == pytest.approx(math.log(2))


def test_module(backend):
    batch = random_batch(1)
    module = StepPrefLoss(loss_type="ipo", beta=0.2, backend=backend)
    assert "loss_type='ipo'" in repr(module) and "beta=0.2" in repr(module)
    want = step_pref_loss(batch.logits, batch.layout, loss_type="ipo", beta=0.2, backend=backend).loss
    assert torch.equal(module(batch.logits, batch.layout).loss, want)
    assert torch.equal(module(batch.logits, batch.labels, batch.step_ids).loss, want)
    assert torch.equal(module(batch.logits, labels=batch.labels, step_ids=batch.step_ids).loss, want)
    assert torch.equal(module(batch.logits, batch.layout, batch.layout.pair_by_index()).loss, want)
    assert not torch.equal(module(batch.logits, batch.layout, beta=0.7).loss, want)
    with pytest.raises(ValueError, match="loss_type: expected the name of a loss"):
        StepPrefLoss("dpo")
    with pytest.raises(TypeError, match="simpo_gamma"):
        StepPrefLoss("sigmoid", simpo_gamma=1.0)


def test_outputs_are_plain_objects(batch):
    out = step_pref_loss(batch.logits, batch.layout)
    assert out == out and out != step_pref_loss(batch.logits, batch.layout)  # by identity: tensors have no truth value
    assert "loss=" in repr(out) and "layout" not in repr(out)
    assert isinstance(step_logps(batch.logits, batch.layout), StepLogps)
    assert torch.equal(
        step_logps(batch.logits, batch.labels, batch.step_ids).sums, step_logps(batch.logits, batch.layout).sums
    )
