# SPDX-License-Identifier: Apache-2.0
"""Losses of lists of responses: golden values by hand.

Mutation of sspo_ext/losses/lists.py, caught by the test named (on a copy of the package):
  lists of one counted in the mean          test_plackett_luce_by_hand
"""

# ruff: noqa: E501 (tables of calls and their messages)
import math

import pytest
import torch
from helpers.step_logps import made, softplus, t

from sspo_ext.losses.lists import level_pairs, listwise_loss, plackett_luce_loss, tpo_l_loss, tpo_loss, trpa_loss
from sspo_ext.losses.pref import pref_loss


def test_plackett_luce_by_hand():
    # rewards 2, 1, 0: -log(e^2 / (e^2 + e + 1)) - log(e / (e + 1))
    logps, layout = made([[-1.0]], [[-2.0]], [[-3.0]])
    ref = t(-3.0, -3.0, -3.0)
    want = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    out = plackett_luce_loss(logps, layout, torch.tensor([[0, 1, 2]]), ref=ref, beta=1.0)
    assert out.loss.item() == pytest.approx(want)
    # the other way round, and a list that is shorter; a list of one is no list
    lists = torch.tensor([[2, 1, 0], [0, 1, -1], [2, -1, -1]])
    out = plackett_luce_loss(logps, layout, lists, ref=ref, beta=1.0)
    turned = math.log(1 + math.exp(1) + math.exp(2)) + math.log(1 + math.exp(1))
    assert out.losses.tolist() == pytest.approx([turned, softplus(-1.0), 0.0])
    assert out.loss.item() == pytest.approx((turned + softplus(-1.0)) / 2)


def test_two_responses_are_dpo():
    logps, layout = made([[-1.0]], [[-2.0, -0.5]], [[-3.0]], [[-1.5]])
    ref, pairs = t(-2.0, -2.0, -2.0, -2.0), torch.tensor([[0, 2], [1, 3]])
    want = pref_loss(logps, layout, pairs, ref=ref, beta=0.7).loss
    assert plackett_luce_loss(logps, layout, pairs, ref=ref, beta=0.7).loss.item() == pytest.approx(want.item())
    # scores far apart: all the weight is on the first
    far = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert listwise_loss(logps, layout, pairs, far, ref=ref, beta=0.7).loss.item() == pytest.approx(want.item())


def test_listwise_by_hand():
    # rewards 1, 0 ; p = softmax(ln 3, 0) = 3/4, 1/4: 3/4 softplus(-1) + 1/4 softplus(1)
    logps, layout = made([[-1.0]], [[-2.0]], [[-2.0]])
    lists, scores = torch.tensor([[0, 1, -1]]), torch.tensor([[math.log(3), 0.0, 99.0]])
    out = listwise_loss(logps, layout, lists, scores, beta=1.0)
    assert out.loss.item() == pytest.approx(0.75 * softplus(-1.0) + 0.25 * softplus(1.0))
    cold = listwise_loss(logps, layout, lists, scores, beta=1.0, score_temperature=0.5)  # 9 : 1
    assert cold.loss.item() == pytest.approx(0.9 * softplus(-1.0) + 0.1 * softplus(1.0))


def test_tpo_by_hand():
    # S = -2, -6 with n = 2, 3, gold -8 with n = 2: z = .5 * 4 ; means -1, -2: z = 2 * 1 - .5
    logps, layout = made([[-1.0, -1.0]], [[-2.0, -2.0, -2.0]], [[-4.0, -4.0]])
    pairs, gold = torch.tensor([[0, 1]]), torch.tensor([2])
    out = tpo_loss(logps, layout, pairs, gold, beta=0.5, tpo_alpha=0.1)
    assert out.loss.item() == pytest.approx(softplus(-2.0) + 0.4) and out.metrics["nll"].item() == 4
    out = tpo_l_loss(logps, layout, pairs, gold, tpo_alpha=0.1, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * softplus(-1.5) + 0.1 * softplus(1.5) + 0.4)


def test_trpa_by_hand():
    # means of log-ratios 1, 0, -1; b = 2 * 2.5 from the top level, else 2
    logps, layout = made([[-1.0, -1.0]], [[-2.0]], [[-3.0]])
    ref = t(-4.0, -2.0, -2.0)
    index, top = level_pairs(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    assert index.tolist() == [[0, 1], [0, 2], [1, 2]] and top.tolist() == [True, True, False]
    out = trpa_loss(logps, layout, index, top, ref=ref, beta=2.0)
    assert out.losses.tolist() == pytest.approx([softplus(-5.0), softplus(-10.0), softplus(-2.0)])
    less = trpa_loss(logps, layout, index, top, ref=ref, beta=2.0, top_scale=0.25)
    assert less.losses.tolist() == pytest.approx([softplus(-0.5), softplus(-1.0), softplus(-2.0)])
    assert level_pairs(torch.tensor([1, 2, 0, 1]), torch.tensor([0, 1, 0, 1]))[0].tolist() == [[3, 1]]
