# SPDX-License-Identifier: Apache-2.0
"""Outcome advantages and their combination with the step signal: golden values, TRL's formula, degenerate groups.

Mutations of sspo_ext/signals/baselines.py, each caught by the test named:
  n in the deviation's denominator                           test_grpo_is_trls_formula
  rounding taken for a deviation                             test_constant_rewards_have_no_advantage
  rloo without n / (n - 1); reinforce++ by group             test_golden_values
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.signals.credit.baselines import BASELINES, EPSILON, combine_advantages, outcome_advantages

F64 = torch.float64
R = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0], dtype=F64)
G = torch.tensor([4, 1, 4, 1, 4])
# group 4 has 1, .5, 1: mean 5/6, std sqrt(1/12); group 1 has 0, 0; the batch's mean is .5 and its std .5
GOLDEN = {
    "reinforce": [1, 0, 0.5, 0, 1],
    "rloo": [0.25, 0, -0.5, 0, 0.25],
    "dr_grpo": [1 / 6, 0, -1 / 3, 0, 1 / 6],
    "grpo": [1 / 6 / (12**-0.5 + 1e-4), 0, -1 / 3 / (12**-0.5 + 1e-4), 0, 1 / 6 / (12**-0.5 + 1e-4)],
    "reinforce++": [0.5 / 0.5001, -0.5 / 0.5001, 0, -0.5 / 0.5001, 0.5 / 0.5001],
    # squares of dr_grpo: 1/36 + 1/9 + 1/36 = 1/6, over 4
    "reinforce++_baseline": [x / (24**-0.5 + 1e-4) for x in (1 / 6, 0, -1 / 3, 0, 1 / 6)],
}


@pytest.mark.parametrize("name", BASELINES)
def test_golden_values(name):
    got = outcome_advantages(R, name, groups=G)
    torch.testing.assert_close(got, torch.tensor(GOLDEN[name], dtype=F64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**20))
def test_grpo_is_trls_formula(groups, size, seed):
    """GRPOTrainer: rewards.view(-1, G), minus the mean, over std + 1e-4; in any order of the batch."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(groups, size, generator=g, dtype=F64)
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPSILON)
    shuffled = torch.randperm(groups * size, generator=g)
    ids = torch.arange(groups).repeat_interleave(size)
    got = outcome_advantages(rewards.reshape(-1)[shuffled], "grpo", groups=ids[shuffled])
    torch.testing.assert_close(got, want.reshape(-1)[shuffled])


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "reinforce"])
@pytest.mark.parametrize("rewards, ids", [([0.3] * 7, [1] * 7), ([0.7], [0]), ([], [])])
def test_constant_rewards_have_no_advantage(name, rewards, ids):
    got = outcome_advantages(torch.tensor(rewards), name, groups=torch.tensor(ids, dtype=torch.int64))
    assert got.tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
def test_groups_of_one(name):
    got = outcome_advantages(torch.tensor([1.0, 0.0, 5.0]), name, groups=torch.tensor([0, 1, 2]))
    assert got.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [n for n in BASELINES if n != "reinforce"])
def test_what_is_not_finite_is_not_hidden(name, bad):
    rewards, groups = torch.tensor([bad, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    of_group = [True, True, False, False] if "++" not in name else [True] * 4
    assert outcome_advantages(rewards, name, groups=groups).isfinite().logical_not().tolist() == of_group
    assert not outcome_advantages(rewards[:1], name, groups=groups[:1]).isfinite().any()


def test_combinations():
    step, outcome = torch.tensor([0.5, -0.25, 2.0]), torch.tensor([1.0, -2.0])
    sequence = torch.tensor([0, 0, 1], dtype=torch.int32)

    def combine(how, **scales):
        return combine_advantages(step, outcome, sequence, how, **scales).tolist()

    assert combine("add") == [1.5, 0.75, 0.0]
    assert combine("add", step_scale=2.0, outcome_scale=0.5) == [1.5, 0.0, 3.0]
    assert combine("multiply") == [0.5, -0.25, -4.0]
    assert combine("multiply", step_scale=2.0) == [1.0, -0.5, -8.0]
    assert combine("replace", step_scale=2.0) == [1.0, -0.5, 4.0]


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: outcome_advantages(R, "gae", groups=G), ValueError, "name: expected one of 'reinforce'"),
        (lambda: outcome_advantages(R, "grpo"), TypeError, "groups: expected"),
        (lambda: outcome_advantages(R, "grpo", groups=G[:3]), ValueError, r"groups: expected shape \(5,\)"),
        (lambda: outcome_advantages(R, "grpo", groups=G.double()), TypeError, "groups: expected an integer"),
        (lambda: outcome_advantages(R.long(), "grpo", groups=G), TypeError, "rewards: "),
        (lambda: combine_advantages(R, R, G, "sum"), ValueError, "how: expected one of"),
        (lambda: combine_advantages(R, R, G[:2]), ValueError, "step_sequence: expected shape"),
        (
            lambda: combine_advantages(R, R, G - 3),
            ValueError,
            "step_sequence: expected numbers of the 5 sequences, got -",
        ),
        (lambda: combine_advantages(R, R[:2], G - 1), ValueError, "step_sequence: expected numbers of the 2 sequ"),
        (lambda: combine_advantages(R, R, G, step_scale="2"), TypeError, "step_scale: expected a number"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
