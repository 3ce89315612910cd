# SPDX-License-Identifier: Apache-2.0
"""SSPOTrainer with log-probabilities as values: on the scale of the rewards.

Mutations, each caught by the first test: the values are not put on that scale; the floor of the options is not used.
"""

import pytest
import torch

pytest.importorskip("transformers")

from helpers.rl import make_trainer

FLOOR = -6.85  # some of the random model's values are below e^-6.85, others above


def trainer_of(folder, **options):
    reduced = {"reduce": "logprob", "floor": FLOOR}
    return make_trainer(folder, probe_options=reduced, gamma=1.0, lam=0.0, combine="replace", **options)


def test_values_are_logarithms_on_the_scale_of_rewards(tmp_path):
    kept = {}
    trainers = [trainer_of(tmp_path / "log", max_steps=1), make_trainer(tmp_path / "joint", max_steps=1)]
    for name, trainer in zip(("log", "joint"), trainers, strict=True):
        trainer.on_rollouts = lambda rollouts, name=name: kept.setdefault(name, rollouts)
        trainer.train()
    assert [r.completion_ids for r in kept["log"]] == [r.completion_ids for r in kept["joint"]]
    below = 0
    for log, joint in zip(kept["log"], kept["joint"], strict=True):
        assert log.values[-1] == 0
        expected = 1 - torch.tensor(joint.values[:-1]).log().clamp(min=FLOOR) / FLOOR
        torch.testing.assert_close(torch.tensor(log.values[:-1]), expected, atol=1e-4, rtol=1e-4)
        below += int((expected == 0).sum())
    assert 0 < below < sum(len(r.steps) for r in kept["log"])


def test_the_last_step_gains_its_surprise_and_loses_what_it_had(tmp_path):
    trainer = trainer_of(tmp_path, scale_advantages=False, min_signal=0.0)
    values = [[0.25, 0.75, 0.0], [0.25, 0.75, 0.0]]  # three quarters and one quarter of the floor away from certainty
    found = trainer.advantages(torch.tensor([1.0, 0.0]), [2, 2], values, torch.zeros(2, dtype=torch.int64))
    assert found == [[0.5, 0.25], [0.5, -0.75]]


def test_min_signal_is_in_shares_of_the_floor(tmp_path):
    """Steps that add .005 of the floor's nats are below the default of .01 of them."""
    trainer = trainer_of(tmp_path, min_signal=0.01)
    values = [[0.99, 0.995, 0.0]]
    found = trainer.advantages(torch.tensor([1.0]), [2], values, torch.zeros(1, dtype=torch.int64))
    assert found == [[0.0, 0.0]]
