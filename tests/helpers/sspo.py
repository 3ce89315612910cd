# SPDX-License-Identifier: Apache-2.0
"""An SSPOTrainer whose completions and values are known."""

from helpers.rl import ROWS, Says, make_tokenizer, make_trainer
from sspo_ext.train.sspo_trainer import SSPOTrainer

TEXTS = ["1+1\n#2<eos>", "3<eos>", "0\n1\n2<eos>", "ab"]  # steps: 2, 1, 3, 1 (cut off)
REWARDS = [1.0, 0.0, 1.0, 0.0]


def right(prompt, completion, answer):
    return float("2" in completion)


class Fixed(SSPOTrainer):
    """Values that are known: V_k = 0.1 * (k + 1)."""

    def step_values(self, rollouts):
        return [[0.1 * (k + 1) for k in range(len(r.steps))] + [0.0] if r.steps else [0.1] for r in rollouts]


def said(folder, texts=TEXTS, trainer_class=Fixed, **options):
    tokenizer = make_tokenizer()
    options = {"rows": ROWS[:1], "max_steps": 1, "reward_func": right, **options}
    return make_trainer(
        folder, tokenizer=tokenizer, engine=Says(tokenizer, texts), trainer_class=trainer_class, **options
    )
