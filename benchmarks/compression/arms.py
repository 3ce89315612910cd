# SPDX-License-Identifier: Apache-2.0
"""The arms: the ways of training that are compared. All use `SSPOTrainer`, with equal updates and equal samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sspo_ext.train.experience import Rollout
from sspo_ext.train.sspo_trainer import SSPOTrainer

from .pairs import PairArm


class ZeroValues(SSPOTrainer):
    """V = 0: shows the effect of the discount alone."""

    def step_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        return [[0.0] * (len(r.steps) + 1) for r in rollouts]


class ShuffledValues(SSPOTrainer):
    """The probe's values, shuffled over all states of the batch: the same numbers, without their meaning."""

    def step_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        values = super().step_values(rollouts)
        states = np.array([v for row in values for v in row[:-1]])
        order = np.random.default_rng([self.args.seed, self.state.global_step]).permutation(len(states))
        shuffled, at, found = states[order].tolist(), 0, []
        for row in values:
            found.append([*shuffled[at : at + len(row) - 1], 0.0])
            at += len(row) - 1
        return found


class Judge(Protocol):
    """A task, as far as a reward needs it."""

    def reward(self, prompt: Any, completion: str, answer: Any) -> float:
        """1 for a right answer, else 0."""
        ...


def word_tokens(completion: str) -> int:
    """The tokens of the word-level tokenizer, with the end of sequence."""
    return len(completion.split(" ")) + 1


@dataclass(frozen=True)
class Arm:
    name: str
    text: str
    options: dict = field(default_factory=dict)  # of SSPOConfig
    trainer: type[SSPOTrainer] = SSPOTrainer
    length_penalty: float = 0.0
    trains: bool = True
    pair_form: PairArm | None = None

    def reward(self, task: Judge, tokens: Callable[[str], int] = word_tokens, usual: float = 50):
        """The task's 0 or 1. With a length penalty a right answer is worth 1 - weight * tokens / usual, at least 0.

        Args:
            task: What judges a solution.
            tokens: Counts the tokens of a completion.
            usual: The tokens that the weight is the price of.
        """
        if not self.length_penalty:
            return task.reward

        def shorter_is_better(prompt: Any, completion: str, answer: Any) -> float:
            return task.reward(prompt, completion, answer) * max(
                0.0, 1 - self.length_penalty * tokens(completion) / usual
            )

        return shorter_is_better


_OUTCOME = {"combine": "outcome"}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("start", "start model", trains=False),
        Arm("rloo", "outcome only, RLOO", _OUTCOME),
        Arm("grpo", "outcome only, GRPO", {**_OUTCOME, "baseline": "grpo"}),
        *(Arm(f"penalty-{w:g}", f"RLOO, length penalty {w:g}", _OUTCOME, length_penalty=w) for w in (0.25, 0.5, 1.0)),
        Arm("sspo-0", "SSPO, lambda 0", {"lam": 0.0}),
        Arm("sspo-0-zero", "... V = 0", {"lam": 0.0}, ZeroValues),
        Arm("sspo-0-shuffled", "... V shuffled", {"lam": 0.0}, ShuffledValues),
        Arm("sspo-0-logprob", "... log V", {"lam": 0.0, "probe_options": {"reduce": "logprob"}}),
        Arm("sspo-9", "SSPO, lambda 0.9", {"lam": 0.9}),
        Arm("sspo-9-zero", "... V = 0", {"lam": 0.9}, ZeroValues),
        Arm("sspo-9-shuffled", "... V shuffled", {"lam": 0.9}, ShuffledValues),
        Arm("no-discount", "gamma 1, lambda 0.9", {"gamma": 1.0, "lam": 0.9}),
        Arm("pairs", "step pairs + likelihood", pair_form=PairArm()),
        Arm("pairs-likelihood", "... likelihood alone", pair_form=PairArm(pairs=False)),
        Arm(
            "whole-pairs",
            "DPO on whole solutions + likelihood",
            pair_form=PairArm(lr=1e-4, epochs=3, whole=True, problems=30, solutions=24, per_update=10),
        ),
    )
}

DECISIVE = ("start", "rloo", "sspo-9", "sspo-0", "sspo-0-zero", "sspo-0-shuffled", "penalty-0.5")
