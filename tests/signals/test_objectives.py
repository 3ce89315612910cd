# SPDX-License-Identifier: Apache-2.0
"""Several rewards for one completion: TRL's two ways to aggregate them, and rewards that do not apply.

Mutations of sspo_ext/signals/credit/objectives.py, each caught by the test named:
  normalize_then_sum without the division                         test_a_loud_reward_drowns_nothing
  a reward that does not apply counts as 0 in its group           test_a_function_compares_only_where_it_applies
  weights after the baseline of the sum                           test_trls_formulas
"""

import pytest
import torch

from sspo_ext.signals import rewards_advantages, summed_rewards
from sspo_ext.signals.credit.baselines import BASELINES, outcome_advantages

NAN = float("nan")
GROUPS = torch.arange(4).repeat_interleave(3)


def rewards(seed=0, functions=2):
    return torch.randn(12, functions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("how", ("sum_then_normalize", "normalize_then_sum"))
def test_trls_formulas(how):
    """GRPOTrainer's own lines, written down: groups in a row, standard deviations over n - 1, 1e-4."""
    found = rewards_advantages(rewards(), "grpo", groups=GROUPS, weights=[0.5, 2.0], how=how)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    grouped = rewards().view(4, 3, 2)
    if how == "sum_then_normalize":
        total = (grouped * weights).nansum(-1)
        expected = ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).reshape(-1)
        torch.testing.assert_close(found, expected)
        return
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    each = each.reshape(12, 2)
    torch.testing.assert_close(found, (each / (each.std(0) + 1e-4) * weights).nansum(-1))


@pytest.mark.parametrize("name", BASELINES)
def test_one_function_is_the_plain_baseline(name):
    one = rewards(functions=1)
    plain = outcome_advantages(one[:, 0], name, groups=GROUPS)
    torch.testing.assert_close(rewards_advantages(one, name, groups=GROUPS), plain, rtol=0, atol=0)
    scaled = rewards_advantages(one, name, groups=GROUPS, how="normalize_then_sum")
    torch.testing.assert_close(scaled, plain / (plain.std() + 1e-4))


@pytest.mark.parametrize("name", ("grpo", "rloo", "dr_grpo", "reinforce++", "reinforce++_baseline"))
def test_a_loud_reward_drowns_nothing(name):
    """MO-GRPO's claim: the quiet function has as much to say however loud the other one is."""
    quiet = rewards()
    loud = quiet * torch.tensor([1.0, 1000.0], dtype=torch.float64)

    def told(values, how):
        both = rewards_advantages(values, name, groups=GROUPS, how=how)
        alone = [outcome_advantages(column, name, groups=GROUPS) for column in values.unbind(1)]
        return [torch.corrcoef(torch.stack([both, one]))[0, 1].item() for one in alone]

    even = told(loud, "normalize_then_sum")
    assert even == pytest.approx(told(quiet, "normalize_then_sum"), abs=1e-3)
    assert min(even) > 0.4  # two functions that know nothing of each other: about .7 each
    drowned = told(loud, "sum_then_normalize")
    assert drowned[1] > 0.97 and drowned[0] < 0.4


def test_a_function_compares_only_where_it_applies():
    values = rewards()
    values[2, 1] = values[5, 1] = NAN
    values[9:, 1] = NAN  # to nothing of the last group
    for how in ("sum_then_normalize", "normalize_then_sum"):
        found = rewards_advantages(values, "dr_grpo", groups=GROUPS, how=how)
        assert found.isfinite().all()
    first, second = values.unbind(1)
    applies = ~second.isnan()
    own = outcome_advantages(second[applies], "dr_grpo", groups=GROUPS[applies])
    other = outcome_advantages(first, "dr_grpo", groups=GROUPS)
    expected = other / (other.std() + 1e-4)
    expected[applies] += own / (own.std() + 1e-4)
    torch.testing.assert_close(found, expected)


def test_a_function_that_applies_nowhere_or_tells_nothing():
    values = rewards()
    alone = rewards_advantages(values[:, :1], "grpo", groups=GROUPS, how="normalize_then_sum")
    for silent in (NAN, 3.0):
        values[:, 1] = silent
        found = rewards_advantages(values, "grpo", groups=GROUPS, how="normalize_then_sum")
        torch.testing.assert_close(found, alone, rtol=0, atol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_rewards_that_do_not_differ_are_not_blown_up(name):
    """A constant reward, or one completion to which a function applies, beside one that tells something."""
    values = rewards()
    for silent in ([1.0] * 12, [-3.0, *[NAN] * 11]):
        values[:, 1] = torch.tensor(silent)
        found = rewards_advantages(values, name, groups=GROUPS, how="normalize_then_sum")
        assert found.abs().max() < 8, name


def test_sums():
    values = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 3.0]], requires_grad=True)
    found = summed_rewards(values, [1, -1])
    assert found.tolist()[0] == 1 and found[1].isnan() and found.tolist()[2] == -1 and not found.requires_grad
    torch.testing.assert_close(summed_rewards(values)[2], torch.tensor(5.0))


@pytest.mark.parametrize(
    "values, options, kind, message",
    (
        (torch.ones(3), {}, ValueError, "rewards: expected"),
        (torch.ones(3, 2, dtype=torch.int64), {}, TypeError, "rewards: expected"),
        (torch.ones(3, 0), {}, ValueError, r"rewards: expected \(B, R\) of at least one function, got none"),
        (torch.ones(3, 2), {"weights": [1.0]}, ValueError, "weights: expected one for each of 2 functions"),
        (torch.ones(3, 2), {"weights": [1.0, NAN]}, ValueError, "weights: expected finite numbers"),
        (torch.ones(3, 2), {"how": "sum"}, ValueError, "how: expected"),
        (
            torch.ones(3, 2) * NAN,
            {},
            ValueError,
            "rewards: expected a function that applies to each completion, got no",
        ),
    ),
)
def test_errors(values, options, kind, message):
    with pytest.raises(kind, match=message):
        rewards_advantages(values, "reinforce", **options)
