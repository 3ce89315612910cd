# SPDX-License-Identifier: Apache-2.0
"""RTO: the log-ratios of a DPO model are rewards of tokens, and a policy gradient takes them.

First DPO trains a copy. Then the start model is trained on its own completions, with an advantage for every token:
`step_policy_loss` takes (N,) advantages as well as (S,).

Shows: sampled accuracy in the first and the last update, with rewards of tokens beside the outcome's and without.

System: RTO
Paper: arXiv 2404.18922
Changes: token rewards b1 log(pi_dpo / ref), clipped, minus b2 log(pi / ref), plus the outcome at the end
Ours: no critic: the sum of rewards to come, less its mean over the group at the same token, is the advantage
"""

import copy

import torch

from sspo_ext import step_logps, step_policy_loss
from sspo_ext.demo.play import Task, dpo, features, load_start, policy_batch, sampled, sampled_pairs, sized, table

B1, B2, CLIP = 0.05, 0.01, 0.05
PROMPTS, SAMPLES, UPDATES = sized(24, 4), 8, sized(10, 2)
task = Task("sums")
start, tokenizer = load_start()
pairs = sampled_pairs(start, tokenizer, task, task.problems(sized(128, 24), seed=1, held_out=False))
guide = copy.deepcopy(start)
dpo(guide, start, features(pairs, tokenizer, pair_by="sequence"), updates=sized(30, 2))


def advantages_of(rewards_of_tokens, layout):
    """Rewards to come of every token (N,), less the group's mean at the same place."""
    grid = torch.zeros(layout.shape)
    grid.flatten()[layout.places] = rewards_of_tokens
    prompt = (layout.places % layout.shape[1]).min()
    to_come = grid.flip(1).cumsum(1).flip(1)[:, prompt:]
    there = torch.zeros(layout.shape, dtype=torch.bool)
    there.flatten()[layout.places] = True
    groups, there = to_come.view(PROMPTS, SAMPLES, -1), there[:, prompt:].view(PROMPTS, SAMPLES, -1)
    mean = (groups * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    grid[:, prompt:] = (groups - mean).reshape(to_come.shape)
    return grid.flatten()[layout.places]


found = []
for name, with_tokens in (("outcome only", False), ("and tokens", True)):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(UPDATES):
        problems = task.problems(PROMPTS, seed=100 + k, held_out=False)
        graded = [one for g in sampled(model, tokenizer, task, problems, samples=SAMPLES, seed=k) for one in g]
        batch = policy_batch(tokenizer, [p.prompt for p in problems for _ in range(SAMPLES)], [[t] for t, _ in graded])
        layout, outcome = batch["layout"], torch.tensor([reward for _, reward in graded])
        with torch.no_grad():
            old, ref, wise = (step_logps(m(**batch["inputs"]).logits, layout).tokens for m in (model, start, guide))
        tokens = (B1 * (wise - ref)).clamp(-CLIP, CLIP) - B2 * (old - ref) if with_tokens else torch.zeros_like(old)
        tokens[layout.step_offsets[1:].long() - 1] += outcome  # the last token of each completion
        out = step_policy_loss(
            model.train()(**batch["inputs"]).logits, layout, advantages_of(tokens, layout), old=old, loss_type="ppo"
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if k in (0, UPDATES - 1):
            found.append({"rewards": name, "update": k + 1, "accuracy": outcome.mean().item(),
                          "tokens": layout.num_rows / len(graded)})  # fmt: skip
print(table(found))
