# SPDX-License-Identifier: Apache-2.0
"""GAE over steps: closed forms, a plain loop, normalisation.

Mutations of sspo_ext/signals/gae.py, each caught by the test named:
  sums run over the end of a sequence                        test_nothing_leaks_between_sequences
  the last step has a value behind it                        test_golden_values
  the discount is not raised to the shift                    test_equals_the_loop
  division by a deviation of 0                               test_steps_that_do_not_differ
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspo_ext.signals.credit.gae import step_gae
from sspo_ext.signals.values import StepValues

F64 = torch.float64


def ragged(counts, seed=0):
    """StepValues with counts[b] steps, in float64, and rewards."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts]) + torch.tensor([0, *[1] * len(counts)])
    values = StepValues.from_tensor(torch.rand(sum(counts) + len(counts), generator=g, dtype=F64), offsets.cumsum(0))
    return values, torch.rand(len(counts), generator=g, dtype=F64)


def loop(values, rewards, gamma, lam, step_rewards=None):
    """The recursion, a step at a time."""
    out, at = [], 0
    for v, reward in zip(values.to_lists(), rewards.tolist(), strict=True):
        steps, carried = [], 0.0
        for k in range(len(v) - 1, 0, -1):
            r, v_k = (reward, 0.0) if k == len(v) - 1 else (0.0, v[k])
            if step_rewards is not None:
                r += float(step_rewards[at + k - 1])
            carried = r + gamma * v_k - v[k - 1] + gamma * lam * carried
            steps.append(carried)
        out += reversed(steps)
        at += len(v) - 1
    return torch.tensor(out, dtype=F64)


def test_golden_values():
    """By hand: delta = (.9 * .5 - .25, .9 * .75 - .5, 1 - .75) = (.2, .175, .25); A_2 = .175 + .45 * .25 = .2875."""
    values = StepValues.from_lists([[0.25, 0.5, 0.75, 0.99], [0.5]])
    got = step_gae(values, torch.tensor([1.0, 0.0]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(got, torch.tensor([0.2 + 0.45 * 0.2875, 0.2875, 0.25]))
    assert got.dtype == torch.float32


def test_lambda_0_is_progress():
    values, rewards = ragged([3, 0, 1, 5])
    want = []
    for v, reward in zip(values.to_lists(), rewards.tolist(), strict=True):
        ends = [*v[1:-1], reward] if len(v) > 1 else []
        want += [b - a for a, b in zip(v, ends, strict=False)]
    torch.testing.assert_close(step_gae(values, rewards, gamma=1.0, lam=0.0), torch.tensor(want, dtype=F64))


def test_gamma_lambda_1_is_the_reward_minus_the_value_before():
    values, rewards = ragged([3, 0, 1, 5, 17])
    before = torch.cat([torch.tensor(v[:-1], dtype=F64) for v in values.to_lists()])
    want = rewards[values.step_sequence] - before
    torch.testing.assert_close(step_gae(values, rewards, gamma=1.0, lam=1.0), want)


def test_a_redundant_step_costs_where_values_have_saturated():
    """V = .8 before and after: (gamma - 1) * V."""
    values = StepValues.from_lists([[0.8, 0.8, 0.8, 1.0]])
    got = step_gae(values, torch.tensor([1.0]), gamma=0.9, lam=0.0)
    torch.testing.assert_close(got[:2], torch.full((2,), -0.08))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 13), max_size=6), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.integers(0, 2**20))
def test_equals_the_loop(counts, gamma, lam, shaped, seed):
    values, rewards = ragged(counts, seed)
    extra = torch.randn(values.num_steps, dtype=F64) if shaped else None
    got = step_gae(values, rewards, gamma=gamma, lam=lam, step_rewards=extra)
    torch.testing.assert_close(got, loop(values, rewards, gamma, lam, extra), rtol=1e-12, atol=1e-12)


def test_nothing_leaks_between_sequences():
    values, rewards = ragged([4, 6, 2])
    got = step_gae(values, rewards, gamma=0.9, lam=0.8)
    other = rewards.clone()
    other[1] += 5
    changed = (step_gae(values, other, gamma=0.9, lam=0.8) != got).tolist()
    assert changed == [False] * 4 + [True] * 6 + [False] * 2


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
def test_no_steps(counts, normalize):
    values, rewards = ragged(counts)
    groups = torch.zeros(len(counts), dtype=torch.int64) if normalize == "group" else None
    assert step_gae(values, rewards, normalize=normalize, groups=groups).shape == (0,)


def test_batch_normalisation_keeps_the_mean():
    values, rewards = ragged([3, 4, 1])
    plain = step_gae(values, rewards, gamma=0.9, lam=0.9)
    got = step_gae(values, rewards, gamma=0.9, lam=0.9, normalize="batch")
    torch.testing.assert_close(got, plain / plain.std())


@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1e-1])
def test_steps_that_hardly_differ_are_not_blown_up(spread):
    """All wrong, by a model whose values say little: divided by the deviation alone, a mean of -5000 at 1e-5."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0)) * spread
    values = StepValues.from_lists([[0.5 + x, 0.0] for x in noise.tolist()])
    got = step_gae(values, torch.zeros(64), normalize="batch")
    assert got.mean().item() == pytest.approx(-2, abs=1e-5)
    plain = step_gae(values, torch.zeros(64))
    torch.testing.assert_close(got, 2 * plain / plain.mean().abs())


def test_nan_is_not_hidden():
    values = StepValues.from_lists([[0.2, 0.6, 0.0], [0.5, 0.0], [0.5, 0.0]])
    rewards, groups = torch.tensor([1.0, math.nan, 0.0]), torch.tensor([0, 1, 1])
    plain = step_gae(values, rewards)
    assert plain.isnan().tolist() == [False, False, True, False]
    assert step_gae(values, rewards, normalize="batch").isnan().all()
    assert step_gae(values, rewards, normalize="group", groups=groups).isnan().tolist() == [False, False, True, True]


def test_group_normalisation_standardises_each_group():
    values, rewards = ragged([3, 4, 1, 2])
    groups = torch.tensor([9, 2, 9, 2])
    plain = step_gae(values, rewards, gamma=0.9, lam=0.9)
    got = step_gae(values, rewards, gamma=0.9, lam=0.9, normalize="group", groups=groups)
    of_step = groups[values.step_sequence]
    for g in (2, 9):
        mine = plain[of_step == g]
        torch.testing.assert_close(got[of_step == g], (mine - mine.mean()) / mine.std())


@pytest.mark.parametrize("normalize, want", [("batch", 0.3), ("group", 0.0)])
def test_steps_that_do_not_differ(normalize, want):
    """0.3 in float32 has rounding in its deviation: still no division by it."""
    values = StepValues.from_lists([[0.7]] + [[0.7, 0.0]] * 7)
    groups = torch.zeros(8, dtype=torch.int64) if normalize == "group" else None
    got = step_gae(values, torch.ones(8), normalize=normalize, groups=groups)
    torch.testing.assert_close(got, torch.full((7,), want))


@pytest.mark.parametrize("normalize, want", [("batch", 0.5), ("group", 0.0)])
def test_one_step(normalize, want):
    groups = torch.zeros(1, dtype=torch.int64) if normalize == "group" else None
    got = step_gae(StepValues.from_lists([[0.5, 0.0]]), torch.ones(1), normalize=normalize, groups=groups)
    assert got.tolist() == [want]


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"values": [[0.1, 0.2]]}, TypeError, "values: expected a StepValues"),
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards: expected shape \(2,\)"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, TypeError, "rewards: "),
        ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, ValueError, "lam: "),
        ({"lam": True}, TypeError, "lam: "),
        ({"normalize": "std"}, ValueError, "normalize: expected one of"),
        ({"normalize": "group"}, ValueError, "groups: expected with normalize='group'"),
        ({"groups": torch.zeros(2, dtype=torch.int64)}, ValueError, "groups: expected with normalize='group'"),
        ({"step_rewards": torch.zeros(2)}, ValueError, r"step_rewards: expected shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    args = {"values": StepValues.from_lists([[0.1, 0.2, 0.3], [0.5, 0.5]]), "rewards": torch.zeros(2)} | change
    with pytest.raises(error, match=match):
        step_gae(args.pop("values"), args.pop("rewards"), **args)


# ---- StepValues


def test_values_round_trip():
    values = StepValues.from_lists([[0.5, 0.25], [1.0], [0.0, 0.5, 0.75]])
    assert values.values.tolist() == [0.5, 0.25, 1.0, 0.0, 0.5, 0.75] and values.offsets.tolist() == [0, 2, 3, 6]
    assert values.steps_per_sequence.tolist() == [1, 0, 2] and values.step_sequence.tolist() == [0, 2, 2]
    assert (values.num_sequences, values.num_steps) == (3, 3)
    assert values.to("cpu").to_lists() == [[0.5, 0.25], [1.0], [0.0, 0.5, 0.75]]
    assert values.with_values(torch.zeros(6)).to_lists() == [[0.0, 0.0], [0.0], [0.0, 0.0, 0.0]]


def test_values_are_constants():
    assert not StepValues.from_tensor(torch.ones(2, requires_grad=True), torch.tensor([0, 2])).values.requires_grad


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: StepValues.from_lists([[0.5], []]), "at least V_0"),
        (lambda: StepValues.from_lists([0.5]), "flat list"),
        (lambda: StepValues.from_lists([[0.5], [1.0, float("nan")]]), "got nan for V_1 of sequence 1"),
        (lambda: StepValues.from_tensor(torch.zeros(3), torch.tensor([0, 2])), "run from 0 to 3"),
        (lambda: StepValues.from_tensor(torch.zeros(3), torch.tensor([0, 2, 2, 3])), "at least V_0"),
    ],
)
def test_values_refuse(build, match):
    with pytest.raises(ValueError, match=match):
        build()
