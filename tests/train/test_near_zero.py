# SPDX-License-Identifier: Apache-2.0
"""Values that are all but zero: the trainer says so once, and names the command that compares probes.

Mutations, each caught: the last, terminal value counts (test_the_share_leaves_out_the_terminal_value); the warning
comes in every update (test_it_is_said_once); a subclass's own values warn (test_own_values_are_the_users_business).
"""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import PROMPTS, make_model, make_trainer

from sspo_ext.train.experience import Summary
from sspo_ext.train.rollout_metrics import near_zero, update_metrics
from sspo_ext.train.sspo_trainer import SSPOTrainer

ROWS = [{"prompt": prompt, "answer": "fea"} for prompt in PROMPTS]
SAID = r"100\.0% of an update's values are below 0\.001: after the probe '#'.*`sspo-ext probe`"


def summary(*values):
    return Summary(0, 0.0, len(values) - 1, list(values), 5, True)


def test_the_share_leaves_out_the_terminal_value():
    rows = [summary(0.0009, 0.5, 0.002, 0.0), summary(0.0), summary(0.0, 0.0)]
    assert near_zero(rows) == 0.5  # of 0.0009, 0.5, 0.002 and the other's V_0
    assert update_metrics(rows, [[0.1]])["values/near_zero"] == (0.5, 1)
    assert near_zero([]) == 0 and "values/near_zero" not in update_metrics([summary(0.0)], [[0.1]])


def test_it_is_said_once(tmp_path):
    """A random model gives three letters the probability 28^-3."""
    trainer = make_trainer(tmp_path, model=make_model(scale=1.0), rows=ROWS, max_steps=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("sspo-ext probe" in str(w.message) for w in said) == 1
    lines = [line for line in trainer.state.log_history if "values/near_zero" in line]
    assert [line["values/near_zero"] for line in lines] == [1, 1, 1]
    with pytest.warns(UserWarning, match=SAID):
        make_trainer(tmp_path, model=make_model(scale=1.0), rows=ROWS, max_steps=1).train()


def test_values_that_say_something_are_not_warned_of(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sspo-ext probe")
        trainer.train()
    assert trainer.state.log_history[0]["values/near_zero"] < 0.9


def test_own_values_are_the_users_business(tmp_path):
    class Zeros(SSPOTrainer):
        def step_values(self, rollouts):
            return [[0.0] * (len(r.steps) + 1) for r in rollouts]

    trainer = make_trainer(tmp_path, trainer_class=Zeros, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sspo-ext probe")
        trainer.train()
    assert trainer.state.log_history[0]["values/near_zero"] == 1
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
