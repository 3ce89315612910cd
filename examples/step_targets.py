# SPDX-License-Identifier: Apache-2.0
"""Losses without pairs: every step of graded completions has a target, from its value.

The completions are the start model's own, right and wrong. Direct Advantage fits each step's log-ratio to its
advantage, by the values that the start model gives to prefixes. OREO trains a critic on hidden states beside it.

Shows: most steps' log-ratios get the sign of their advantage, more so where it is fitted (Direct Advantage) than
    where a critic learns beside it (OREO); accuracy and length on other problems stand beside it.

System: Direct Advantage
Paper: arXiv 2412.18279
Changes: a squared loss of each step's log-ratio and its advantage by a frozen critic
Ours: the critic is the start model, asked for its answer after each step; the scaling is read from a summary

System: OREO
Paper: arXiv 2412.16145
Changes: a critic and the policy together make the soft Bellman equation hold in every step
Ours: the critic is one linear layer on the start model's hidden states; no KL term
"""

import copy

import torch

from sspo_ext import step_logps
from sspo_ext.demo.play import Task, load_start, policy_batch, sampled, score, sized, table, train
from sspo_ext.losses import direct_advantage_loss, oreo_loss, oreo_value_loss
from sspo_ext.signals import probe_step_values, split_text, step_gae

task = Task("sums")
start, tokenizer = load_start()
problems = task.problems(sized(128, 16), seed=1, held_out=False)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)
rows = [
    (problem, [text[a:b] for a, b in split_text(text)], reward)
    for problem, group in zip(problems, sampled(start, tokenizer, task, problems, samples=4), strict=True)
    for text, reward in group
]


def collate(some):
    batch = policy_batch(tokenizer, [p.prompt for p, _, _ in some], [steps for _, steps, _ in some])
    rewards = torch.tensor([reward for _, _, reward in some])
    answers = [p.answer for p, _, _ in some]
    values = probe_step_values(start, batch["batch"], task.probe, answers, tokenizer=tokenizer)
    advantages = step_gae(values, rewards, gamma=1.0, lam=0.0)  # V_k - V_(k-1), and R - V at the end
    with torch.no_grad():
        outputs = start(**batch["inputs"], output_hidden_states=True)
    layout = batch["layout"]
    before = layout.rows[
        layout.step_offsets[:-1].long()
    ].long()  # the position from which each step's first token comes
    return batch | {
        "rewards": rewards, "advantages": advantages, "ref": step_logps(outputs.logits, layout),
        "states": outputs.hidden_states[-1].flatten(0, 1)[before],
    }  # fmt: skip


def direct_advantage(logps, b):
    return direct_advantage_loss(logps, b["layout"], b["advantages"], ref=b["ref"], beta=0.5).loss


def oreo(logps, b):
    values = critic(b["states"]).squeeze(-1)
    learn = oreo_value_loss(logps, b["layout"], values, b["rewards"], ref=b["ref"], beta=0.1).loss
    return learn + oreo_loss(logps, b["layout"], values.detach(), b["rewards"], ref=b["ref"], beta=0.1).loss


found = [{"loss": "start", "signs": "", **score(start, tokenizer, task, held_out)}]
for name, loss_of in (("Direct Advantage", direct_advantage), ("OREO", oreo)):
    torch.manual_seed(0)
    model = copy.deepcopy(start)
    critic = model.critic = torch.nn.Linear(start.config.hidden_size, 1)  # a part of the model, so that it is trained
    signs = []

    def loss(batch, model=model, loss_of=loss_of, signs=signs):
        logps = step_logps(model(**batch["inputs"]).logits, batch["layout"])
        clear = batch["advantages"].abs() > 0.1
        agree = (logps.sums.detach() - batch["ref"].sums).sign() == batch["advantages"].sign()
        signs.append(agree[clear].float().mean().item())
        return loss_of(logps, batch)

    train(model, rows, loss, updates=sized(40, 2), batch_size=32, lr=2e-4, collate=collate)
    found.append({"loss": name, "signs": sum(signs[-5:]) / len(signs[-5:]), **score(model, tokenizer, task, held_out)})
print(table(found))
