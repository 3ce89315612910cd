# SPDX-License-Identifier: Apache-2.0
"""Token weights that make a method of a loss: by hand, and what they cost.

Mutations of sspo_ext/token_weights.py, each caught by the test named (on a copy of the package). 38 were tried; the 14
marked + survived at first, and tests were written or mended for them:
  LD-DPO: the longer of two lengths; one token fewer; holes counted      test_ld_dpo_by_hand
  LD-DPO: weights the other way round; an odd number of rows             test_ld_dpo_by_hand
  LD-DPO: alpha of 0 or 1 refused, above 1 allowed                       test_ld_dpo_by_hand
+ LD-DPO: a sequence's first token scored                                test_ld_dpo_by_hand
+ LD-DPO: lengths of another pair; ignore_index not heeded               test_ld_dpo_compares_a_row_with_its_own_rejected_one
  TGDPO: sign swapped, or one sign; no beta, no alpha, no 1              test_tgdpo_is_its_formula
  SPO: the threshold itself counts; above it; of log-probs; its default  test_spo_by_hand
  Full-Step-DPO: worse as better; no tau; NaN where nothing is scored    test_full_step_by_hand
  Full-Step-DPO: softmax over unscored tokens, or over the batch         test_full_step_by_hand
  Full-Step-DPO: shares not times n; times T                             test_full_step_by_hand
+ gradient to TGDPO's guide; its dtype kept; SPO's bool kept             test_weights_are_constants_in_float32
+ Full-Step-DPO: softmax in half precision                               test_weights_are_constants_in_float32
+ no check of labels, negative alpha, guide, chosen, old_logps, rewards, ids   test_messages
"""
# ruff: noqa: E501 (a table of mutations)

import pytest
import torch
import torch.nn.functional as F

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import step_logps
from sspo_ext.losses.pref import step_pref_loss
from sspo_ext.losses.token_weights import full_step_weights, ld_dpo_weights, spo_weights, tgdpo_weights

F64 = torch.float64
IDS = torch.tensor([[-1, 0, 1]])


def tgdpo(guide, chosen):
    return tgdpo_weights(guide, chosen, beta=0.1, tgdpo_alpha=0.5)


def full_step(rewards, ids):
    return full_step_weights(rewards, ids, better=True)


def test_ld_dpo_by_hand():
    # completions of 2 and 4 tokens: the first two of each count fully; a hole in the second does not count
    labels = torch.tensor([[-100, 5, 5, -100, -100, -100], [-100, 5, -100, 5, 5, 5]])
    weights = ld_dpo_weights(labels, 0.3)
    assert weights[0, 1:3].tolist() == [1, 1]
    torch.testing.assert_close(weights[1, [1, 3, 4, 5]], torch.tensor([1.0, 1.0, 0.3, 0.3]))
    assert (ld_dpo_weights(labels, 1.0) == 1).all()
    with pytest.raises(ValueError, match=r"ld_alpha: expected a number in \[0, 1\]"):
        ld_dpo_weights(labels, 1.5)
    with pytest.raises(ValueError, match=r"labels: expected rows \[chosen.., rejected..\]"):
        ld_dpo_weights(labels[:1], 0.5)
    # a label on a sequence's first token is not scored: 3 tokens and 2, and so 2 after the first
    assert ld_dpo_weights(torch.tensor([[5, 5, 5, 5], [-100, 5, 5, -100]]), 0.0)[0].tolist() == [1, 1, 1, 0]


def test_ld_dpo_compares_a_row_with_its_own_rejected_one():
    """Two pairs, of 3 and 2 tokens and of 1 and 3: rows are [chosen, chosen, rejected, rejected]."""
    labels = torch.tensor([[9, 5, 5, 5], [9, 5, 9, 9], [9, 5, 5, 9], [9, 5, 5, 5]])
    weights = ld_dpo_weights(labels, 0.5, ignore_index=9)
    assert weights[0].tolist() == [1, 1, 1, 0.5] and weights[2, 1:3].tolist() == [1, 1]
    assert weights[1, 1] == 1 and weights[3].tolist() == [1, 1, 0.5, 0.5]


def test_weights_are_constants_in_float32():
    guide = torch.randn(2, 3, dtype=F64, requires_grad=True)
    weights = tgdpo_weights(guide, torch.tensor([True, False]), beta=0.1, tgdpo_alpha=1.0)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert spo_weights(torch.zeros(1, 2, dtype=F64)).dtype == torch.float32
    # the softmax is taken in float32 whatever the rewards' dtype
    rewards, ids = torch.tensor([[0.3, 1.7, -2.0]]).bfloat16(), torch.tensor([[-1, 0, 0, 1, 2]])
    half = full_step_weights(rewards, ids, better=True)
    assert half.dtype == torch.float32 and torch.equal(half, full_step_weights(rewards.float(), ids, better=True))


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda: ld_dpo_weights(torch.zeros(2, 3), 0.5), TypeError, "labels: expected an integer tensor"),
        (lambda: ld_dpo_weights(torch.zeros(2).long(), 0.5), ValueError, "labels: expected 2 dimensions"),
        (lambda: ld_dpo_weights(torch.zeros(2, 3).long(), -0.1), ValueError, "ld_alpha: expected a number in"),
        (lambda: tgdpo(torch.zeros(2), torch.ones(2) > 0), ValueError, "guide: expected 2 dimensions"),
        (lambda: tgdpo(torch.zeros(2, 3), torch.ones(1) > 0), ValueError, r"chosen: expected shape \(2,\)"),
        (lambda: spo_weights(torch.zeros(3)), ValueError, "old_logps: expected 2 dimensions"),
        (lambda: full_step(torch.zeros(1, 2).long(), IDS), TypeError, "step_rewards: expected a tensor of float32"),
        (lambda: full_step(torch.zeros(1, 2), IDS.float()), TypeError, "step_ids: expected an integer tensor"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_weights_of_zero_cost_nothing():
    labels = torch.tensor([[-100, 5, 5, -100, -100], [-100, 5, 5, 5, 5]])
    ids = torch.where(labels >= 0, 0, -1)
    layout = StepLayout.from_step_ids(labels, ids, token_weights=ld_dpo_weights(labels, 0.0))
    assert layout.num_rows == 4 and layout.counts.tolist() == [2, 2]
    full = StepLayout.from_step_ids(labels, ids)
    assert full.num_rows == 6


def test_tgdpo_is_its_formula():
    """-ls(sum_t beta (1 + alpha beta v_t) u_t on w - sum_t beta (1 - alpha beta v_t) u_t on l)."""
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 2, 6, 7, generator=g, dtype=F64)
    labels, guide = torch.randint(0, 7, (2, 6), generator=g), torch.randn(2, 6, generator=g, dtype=F64)
    ids = torch.tensor([[-1, 0, 0, 0, 0, 0], [-1, -1, 0, 0, 0, -1]])
    beta, alpha = 0.4, 0.7
    weights = tgdpo_weights(guide, torch.tensor([True, False]), beta=beta, tgdpo_alpha=alpha)
    layout = StepLayout.from_step_ids(labels, ids, token_weights=weights)
    ref = step_logps(ref_logits, layout, backend="reference")
    out = step_pref_loss(logits, layout, ref=ref, beta=beta, backend="reference")
    u = [x[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1) for x in (logits, ref_logits)]
    u = (u[0] - u[1]) * (ids[:, 1:] == 0)
    chosen = (beta * (1 + alpha * beta * guide[0, 1:]) * u[0]).sum()
    rejected = (beta * (1 - alpha * beta * guide[1, 1:]) * u[1]).sum()
    torch.testing.assert_close(out.loss, -F.logsigmoid(chosen - rejected), rtol=1e-6, atol=0)


def test_spo_by_hand():
    old = torch.tensor([[0.95, 0.89, 0.9, 0.1]]).log()
    assert spo_weights(old).tolist() == [[0, 1, 0, 1]]
    assert spo_weights(old, 0.5).tolist() == [[0, 0, 0, 1]]


def test_full_step_by_hand():
    # three tokens, steps of 1 and 2, rewards ln 2 and 0: shares 2/4, 1/4, 1/4 of 3
    ids, rewards = torch.tensor([[-1, 0, 1, 1], [-1, -1, -1, -1]]), torch.tensor([[0.6931472, 0.0], [1.0, 2.0]])
    better = full_step_weights(rewards, ids, better=True)
    torch.testing.assert_close(better, torch.tensor([[0, 1.5, 0.75, 0.75], [0, 0, 0, 0]]))
    worse = full_step_weights(rewards, ids, better=False)  # 1/2 : 1 : 1
    torch.testing.assert_close(worse[0], torch.tensor([0, 0.6, 1.2, 1.2]))
    flat = full_step_weights(rewards, ids, tau=0.0, better=True)
    torch.testing.assert_close(flat[0], torch.tensor([0.0, 1, 1, 1]))
