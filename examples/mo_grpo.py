# SPDX-License-Identifier: Apache-2.0
"""MO-GRPO: each reward is normalised by itself before they are added, so that a loud one does not drown the others.

Two rewards: whether the answer is right, 0 or 1, and minus ten for every idle line ("wait let me think again").
GRPO adds them and normalises the sum; MO-GRPO normalises each within its group and adds.
`SSPOTrainer` does so with `multi_objective_aggregation="normalize_then_sum"` and a list of reward functions.

Shows: idle lines vanish under both. GRPO on the sum pays for that with right answers, and MO-GRPO gains some.

System: MO-GRPO
Paper: arXiv 2509.22047
Changes: the advantage is the sum of each reward's own normalised advantage
Ours: the two rewards; each reward's advantages are scaled once more over the batch, as in GDPO (arXiv 2601.05242)
"""

import copy

import torch

from sspo_ext import step_policy_loss
from sspo_ext.demo.play import Task, load_start, policy_batch, sampled, sized, table
from sspo_ext.signals import rewards_advantages

PROMPTS, SAMPLES, UPDATES = sized(24, 4), 8, sized(10, 2)
task = Task("sums")
start, tokenizer = load_start()


groups = torch.arange(PROMPTS).repeat_interleave(SAMPLES)

found = []
for name, how in (("GRPO on the sum", "sum_then_normalize"), ("MO-GRPO", "normalize_then_sum")):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(UPDATES):
        problems = task.problems(PROMPTS, seed=100 + k, held_out=False)
        graded = [one for g in sampled(model, tokenizer, task, problems, samples=SAMPLES, seed=k) for one in g]
        batch = policy_batch(tokenizer, [p.prompt for p in problems for _ in range(SAMPLES)], [[t] for t, _ in graded])
        layout = batch["layout"]
        rewards = {
            "right": torch.tensor([reward for _, reward in graded]),
            "idle": -10.0 * torch.tensor([t.count("wait") for t, _ in graded]),
        }
        both = torch.stack([*rewards.values()], 1)
        advantages = rewards_advantages(both, "grpo", groups=groups, how=how)
        out = step_policy_loss(
            model.train()(**batch["inputs"]).logits, layout, advantages, loss_type="ppo", aggregation="sequence"
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if k in (0, UPDATES - 1):
            found.append({"": name, "update": k + 1} | {n: reward.mean().item() for n, reward in rewards.items()})
print(table(found))
