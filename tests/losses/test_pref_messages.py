# SPDX-License-Identifier: Apache-2.0
"""step_pref_loss: what it refuses, and the messages.

Mutations, each caught by the test named (on a copy of the package):
  smoothing accepted where there is none   test_messages
  stale pairs accepted                     test_pairs_of_another_layout_are_refused
"""

# ruff: noqa: E501 (tables of calls and their messages)
import pytest
import torch
from helpers.batch import Batch, random_batch, random_pairs

from sspo_ext.losses.pref import step_pref_loss

BAD_CALLS = {
    "loss type": ({"loss_type": "sigma"}, ValueError, r"loss_type: expected one of 'sigmoid', .*got 'sigma'"),
    "another name": ({"loss_type": "dpo"}, ValueError, r"got 'dpo'; DPO's loss is called 'sigmoid'"),
    "a policy loss": ({"loss_type": "grpo"}, ValueError, r"loss_type: 'grpo' is a policy loss: call step_policy_loss"),
    "unknown option": ({"simpo_gamma": 1.0}, TypeError, "simpo_gamma: .*'sigmoid'"),
    "typo": ({"label_smothing": 0.1}, TypeError, "label_smothing"),
    "beta": ({"beta": 0.0}, ValueError, "beta: expected a finite number above 0, got 0.0"),
    "beta infinite": ({"beta": float("inf")}, ValueError, "beta: expected a finite number"),
    "label smoothing": ({"label_smoothing": 0.5}, ValueError, r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
    "label smoothing type": ({"label_smoothing": True}, TypeError, "label_smoothing: expected a number"),
    "smoothing where there is none": ({"label_smoothing": 0.1, "loss_type": "hinge"}, ValueError, "label_smoothing: loss_type 'hinge' does not have it"),
    "soft labels where there are none": ({"soft_labels": torch.ones(4), "loss_type": "ipo"}, ValueError, "soft_labels: loss_type 'ipo' does not have it"),
    "both": ({"soft_labels": torch.ones(4), "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 when soft_labels are given"),
    "reference-free": ({"loss_type": "simpo", "ref": torch.zeros(8)}, ValueError, "ref: loss_type 'simpo' is reference-free"),
    "ref shape": ({"ref": torch.zeros(99)}, ValueError, r"ref: expected step sums \(\d+,\), token log-probs \(\d+,\) or \(4, 12\), or a StepLogps, got"),
    "ref type": ({"ref": [0.0]}, TypeError, "ref: expected a torch.Tensor"),
    "ref dtype": ({"ref": torch.zeros(4, 12).long()}, TypeError, "ref: expected a tensor of float32"),
    "ref device": ({"ref": torch.zeros(4, 12, device="meta")}, ValueError, "ref: expected a tensor on cpu"),
    "reduction": ({"reduction": "none"}, ValueError, "reduction: expected one of 'mean', 'sum', got 'none'"),
    "num_items": ({"num_items": -1}, ValueError, "num_items: expected"),
    "num_items as a tensor": ({"num_items": torch.tensor(-1)}, ValueError, "num_items: expected a finite number, 0 or above, got -1"),
    "num_items shape": ({"num_items": torch.ones(1)}, ValueError, r"num_items: expected shape \(\)"),
    "temperature": ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0"),
    "backend": ({"backend": "numpy"}, ValueError, "backend: expected 'auto' or one of 'cpu', 'triton', .*'reference', got 'numpy'"),
    "token weights": ({"token_weights": torch.ones(3)}, ValueError, "token_weights: expected shape"),
    "pairs": ({"pairs": torch.tensor([[0, 99]])}, ValueError, r"pairs: expected step indices in \[0, \d+\), got 99 in pair 0"),
    "step ids beside a layout": ({"step_ids": torch.zeros(4, 12).long()}, TypeError, "step_ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_messages(case):
    kw, error, match = BAD_CALLS[case]
    batch = random_batch(0)
    if "soft_labels" in kw:
        kw = {**kw, "pairs": random_pairs(batch.layout, 0, 4)}
    with pytest.raises(error, match=match):
        step_pref_loss(batch.logits, batch.layout, **{"backend": "reference", **kw})


def test_messages_about_the_call(batch):
    logits, layout, labels, ids = batch.logits, batch.layout, batch.labels, batch.step_ids
    pairs = layout.pair_by_index()
    with pytest.raises(TypeError, match="step_ids: expected .* beside plain labels, got None"):
        step_pref_loss(logits, labels)
    with pytest.raises(TypeError, match="labels: expected a torch.Tensor"):
        step_pref_loss(logits, labels.tolist(), ids)
    with pytest.raises(TypeError, match="pairs: given twice"):
        step_pref_loss(logits, layout, pairs, pairs=pairs)
    with pytest.raises(TypeError, match="step_ids: given twice"):
        step_pref_loss(logits, labels, ids, step_ids=ids)
    with pytest.raises(ValueError, match=r"logits: expected shape \(4, 12, 11\)"):
        step_pref_loss(logits[:, :-1], layout)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 5\)"):
        step_pref_loss(logits[..., :5].contiguous(), layout)
    with pytest.raises(TypeError, match="logits: expected a tensor of float32, bfloat16, float16, float64"):
        step_pref_loss(logits.long(), layout)
    with pytest.raises(ValueError, match="layout: expected it on meta"):
        step_pref_loss(logits.to("meta"), layout)
    with pytest.raises(ValueError, match="pairs: expected them on cpu"):
        step_pref_loss(logits, layout, pairs.to("meta"))


def test_pairs_of_another_layout_are_refused(batch):
    fewer = Batch(batch.logits[:2], batch.labels[:2], batch.step_ids[:2], None)
    with pytest.raises(ValueError, match="pairs: expected pairs of the layout's"):
        step_pref_loss(batch.logits, batch.layout, fewer.layout.pair_by_index())
    emptied = Batch(batch.logits, batch.labels.clone(), batch.step_ids, None)
    emptied.labels[0] = -100
    with pytest.raises(ValueError, match="pairs: expected pairs made for this layout"):
        step_pref_loss(batch.logits, batch.layout, emptied.layout.pair_by_index())
