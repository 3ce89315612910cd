# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as values: by hand on a fake model, and on the scale of rewards.

Mutations: several texts by their largest (test_it_is_the_log_of_joint); no floor (test_the_floor).
"""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from helpers.probing import BATCH, Knows

from sspo_ext.signals.credit.gae import step_gae
from sspo_ext.signals.probing.likelihood import reduced, unit_values
from sspo_ext.signals.probing.probe import probe_step_values
from sspo_ext.signals.values import StepValues


def test_it_is_the_log_of_joint():
    options = {"reduce": "logprob", "floor": -20.0}
    for answers in ([[7, 8], [7]], [[[7, 8], [7, 9], [7, 8]], [7]], [[[7, 8], [7], [7, 9]], [7]]):
        joint = probe_step_values(Knows(), BATCH, [2], answers).values
        got = probe_step_values(Knows(), BATCH, [2], answers, **options)
        torch.testing.assert_close(got.values, joint.log())
    assert got.values.max() < 0


def test_the_floor():
    impossible = [[8, 9, 8], [7]]
    assert probe_step_values(Knows(), BATCH, [2], impossible, reduce="logprob").to_lists()[0] == [-10.0] * 4
    got = probe_step_values(Knows(), BATCH, [2], impossible, reduce="logprob", floor=-1.0).to_lists()
    assert got[0] == [-1.0] * 4 and got[1] == [-1.0]  # log .2 is below -1 too


def test_beyond_what_float32_has_as_a_probability():
    sums, lengths = torch.tensor([-200.0, -201.0, -torch.inf, -torch.inf]), torch.ones(4)
    got = reduced(sums, lengths, [2, 1, 1], "logprob", floor=-300.0)
    assert got.tolist() == pytest.approx([-200 + math.log1p(math.exp(-1)), -300, -300])


def test_a_broken_model_is_an_error():
    class Broken(Knows):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids).logits * float("nan"))

    with pytest.raises(ValueError, match="values: expected finite"):
        probe_step_values(Broken(), BATCH, [2], [[7], [7]], reduce="logprob")


def test_on_the_scale_of_rewards():
    """Worked out by hand, floor -8: a step gains nats / 8, the last its surprise or its fall to the floor."""
    values = StepValues.from_lists([[-4.0, -2.0, -6.0], [-4.0, -2.0, -6.0]])
    unit = unit_values(values, -8.0)
    assert unit.to_lists() == [[0.5, 0.75, 0.25]] * 2
    got = step_gae(unit, torch.tensor([1.0, 0.0]), gamma=1.0, lam=0.0).tolist()
    assert got == [2 / 8, 2 / 8, 2 / 8, -6 / 8]
    idle = unit_values(StepValues.from_lists([[-4.0, -4.0, -4.0]]), -8.0)
    assert step_gae(idle, torch.tensor([1.0]), gamma=0.9, lam=0.0)[0] == pytest.approx(-0.05)  # it costs


def test_what_is_no_logarithm_is_refused():
    for values, floor, message in (
        ([[0.5]], -10.0, r"values: expected log-probabilities in \[-10, 0\]"),
        ([[-11.0]], -10.0, r"values: expected .* got some in \[-11, -11\]"),
        ([[-1.0]], 0.0, "floor: expected a number below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            unit_values(StepValues.from_lists(values), floor)
    with pytest.raises(TypeError, match="values: expected StepValues"):
        unit_values(torch.zeros(1))
    for change, message in (
        ({"floor": -5.0}, "floor: has no effect with reduce 'joint'"),
        ({"reduce": "logprob", "floor": 1.0}, "floor: expected a number below 0"),
        ({"mode": "graded", "floor": -5.0}, "floor: has no effect with mode 'graded'"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_step_values(Knows(), BATCH, [2], [[7], [7]], **change)
