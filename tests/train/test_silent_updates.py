# SPDX-License-Identifier: Apache-2.0
"""Updates without a signal: a model that is never right, and that says so itself, is left as it is.

Run on the code before `min_signal`, the first test was red: two updates moved the weights by 0.6.
"""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import PROMPTS, make_model, make_trainer, parameters

from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

ROWS = [{"prompt": prompt, "answer": "fea"} for prompt in PROMPTS]


def never(prompt, completion, answer):
    return 0.0


def dead(folder, **options):
    """Values near 1 / 28^3 before every step, and no reward."""
    options = {"min_signal": SSPOConfig.min_signal, **options}
    return make_trainer(folder, model=make_model(scale=1.0), rows=ROWS, reward_func=never, **options)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_model_that_is_never_right_is_not_trained(tmp_path, scaled):
    trainer = dead(tmp_path, scale_advantages=scaled)
    before = parameters(trainer.model)
    with pytest.warns(UserWarning, match=r"all 4 completions .* advantage 0 \(all rewards are 0 and the values from"):
        trainer.train()
    assert torch.equal(parameters(trainer.model), before)
    lines = [line for line in trainer.state.log_history if "advantages/signal" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["grad_norm"] == 0 and line["advantages/silent"] == 1
        assert 0 < line["advantages/signal"] < 1e-3 and line["values/first"] < 1e-3


def test_every_difference_counts_if_the_user_says_so(tmp_path):
    trainer = dead(tmp_path, min_signal=0.0)
    before = parameters(trainer.model)
    trainer.train()
    assert (parameters(trainer.model) - before).abs().max() > 0.01
    assert all(line["advantages/silent"] == 0 for line in trainer.state.log_history if "advantages/silent" in line)


def test_the_signal_is_the_spread_before_scaling(tmp_path):
    """Steps of 0.2 and 0.6 differ enough; a hundredth of them does not. The outcome's advantages stay."""
    trainer = make_trainer(tmp_path, gamma=1.0, lam=0.0, min_signal=0.05)
    groups = torch.zeros(2, dtype=torch.int64)

    def advantages(values, rewards):
        found = trainer.advantages(torch.tensor(rewards), [2, 1], values, groups)
        return found, trainer._sums.pop(trainer.accelerator, trainer.args.device)["advantages/signal"]

    values = [[0.2, 0.4, 0.0], [0.4, 0.0]]
    found, signal = advantages(values, [1.0, 1.0])
    steps = torch.tensor([0.2, 0.6, 0.6])
    scale = steps.mean().item() / 2  # more than their standard deviation, 0.231
    assert signal == pytest.approx(scale, rel=1e-6)
    torch.testing.assert_close(torch.tensor(sum(found, [])), steps / scale)
    small = [[1 - (1 - v) / 100 for v in row[:-1]] + [0.0] for row in values]
    found, signal = advantages(small, [1.0, 1.0])
    assert signal == pytest.approx(scale / 100, rel=1e-4)
    assert found == [[0.0, 0.0], [0.0]]
    found, signal = advantages([[0.99, 0.995, 0.0], [0.001, 0.0]], [1.0, 0.0])
    assert signal < 0.05
    assert found[0] == pytest.approx([2**-0.5] * 2) and found[1] == pytest.approx([-(2**-0.5)])


def test_outcomes_that_differ_nowhere_warn_too(tmp_path):
    trainer = dead(tmp_path, combine="outcome")
    with pytest.warns(UserWarning, match=r"all 4 completions .*\(all rewards are 0\)"):
        trainer.train()


def test_values_of_ones_own_go_the_same_way(tmp_path):
    """They have their own scale, which the user knows: a large one needs a larger min_signal, and is not refused."""

    class Own(SSPOTrainer):
        def step_values(self, rollouts):
            return [[100.0 * (k + i) for k in range(len(r.steps))] + [0.0] for i, r in enumerate(rollouts)]

    trainer = make_trainer(tmp_path, trainer_class=Own, reward_func=never, min_signal=1e6)
    with pytest.warns(UserWarning, match="advantage 0"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(tmp_path, trainer_class=Own, reward_func=never).train()


def test_min_signal_is_a_number_of_at_least_0(tmp_path):
    with pytest.raises(ValueError, match="min_signal: expected .*-1"):
        make_trainer(tmp_path, min_signal=-1.0)
