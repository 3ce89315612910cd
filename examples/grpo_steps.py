# SPDX-License-Identifier: Apache-2.0
"""GRPO with an advantage for every step, in a loop of one's own.

The policy completes each problem a few times. The outcome gives each completion GRPO's advantage. Beside it every step
gets its own: the policy says what each prefix is worth (`probe_step_values`), and GAE over steps turns these values
into advantages. `SSPOTrainer` does all this, and more: see examples/sspo.py.

Shows: the sampled completions of the first and the last update, for the outcome alone and with step advantages.
    A few updates are enough to see the second shorten its completions.

System: GRPO
Paper: arXiv 2402.03300
Changes: advantages of a group's outcomes in place of pairs; here with step advantages beside them
Ours: the step advantages, SSPO's as far as it is public
"""

import copy

import torch

from sspo_ext import step_policy_loss
from sspo_ext.demo.play import Task, load_start, policy_batch, sampled, sized, table
from sspo_ext.signals import (
    combine_advantages,
    outcome_advantages,
    probe_step_values,
    split_text,
    step_gae,
)  # fmt: skip

task = Task("sums")
start, tokenizer = load_start()
PROMPTS, SAMPLES, UPDATES = sized(24, 4), 8, sized(10, 2)


def update(model, optimizer, problems, with_steps, seed):
    graded = [one for group in sampled(model, tokenizer, task, problems, samples=SAMPLES, seed=seed) for one in group]
    asked = [p for p in problems for _ in range(SAMPLES)]
    steps = [[text[a:b] for a, b in split_text(text)] for text, _ in graded]
    rewards = torch.tensor([reward for _, reward in graded])
    groups = torch.arange(len(problems)).repeat_interleave(SAMPLES)
    batch = policy_batch(tokenizer, [p.prompt for p in asked], steps)
    layout, inputs = batch["layout"], batch["inputs"]
    outcome = outcome_advantages(rewards, "grpo", groups=groups)
    advantages = outcome[layout.step_sequence.long()]
    if with_steps:
        values = probe_step_values(model, batch["batch"], task.probe, [p.answer for p in asked], tokenizer=tokenizer)
        gae = step_gae(values, rewards, gamma=0.9, lam=0.0, normalize="batch")
        advantages = combine_advantages(gae, outcome, layout.step_sequence)
    out = step_policy_loss(model.train()(**inputs).logits, layout, advantages, loss_type="ppo", aggregation="sequence")
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    count = len(steps)
    return {"accuracy": rewards.mean().item(), "tokens": layout.num_rows / count, "steps": layout.num_steps / count}


found = []
for name, with_steps in (("outcome only", False), ("with step advantages", True)):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(UPDATES):
        problems = task.problems(PROMPTS, seed=100 + k, held_out=False)
        numbers = update(model, optimizer, problems, with_steps, seed=k)
        if k in (0, UPDATES - 1):
            found.append({"advantages": name, "update": k + 1, **numbers})
print(table(found))
