# SPDX-License-Identifier: Apache-2.0
"""EPO's training for turns: a conversation whose turns are the steps, with a process reward for each.

The user asks a sum in parts, and the model answers each in a line of its own: its turns are steps of one sequence, and
the user's words between them are not scored. A turn is right if its line is. Each turn's advantage is the discounted
sum of the rewards of its own and later turns, less the mean of the group at that turn.

Shows: the share of right turns, and of conversations that are right to the end, which grows from a tenth to more than
    two thirds.

System: EPO
Paper: arXiv 2502.12486
Changes: multi-turn policy gradient with a process reward a turn, without supervised training before
Ours: arithmetic in place of strategies for another agent; the baseline is the group's mean at the turn
"""

import torch

from sspo_ext import StepLayout, step_policy_loss
from sspo_ext.demo.play import Task, complete, load_start, sized, table

PROMPTS, SAMPLES, UPDATES, TURNS, GAMMA = sized(24, 4), 6, sized(12, 2), 3, 0.9
task = Task("sums")
model, tokenizer = load_start()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)


def converse(problems, seed):
    """Conversations as (text, is it the model's) parts, and (B, TURNS) rewards."""
    talks = [[(f"{p.start} + {p.ops[0]} + {p.ops[1]} + {p.ops[2]} = ? \n ", False)] for p in problems]
    rewards, states = torch.zeros(len(problems), TURNS), [p.start for p in problems]
    for turn in range(TURNS):
        for talk, state in zip(talks, states, strict=True):
            talk.append((f"so far {state} \n ", False))
        said = complete(model, tokenizer, ["".join(part for part, _ in talk) for talk in talks], max_new_tokens=8,
                        seed=seed * TURNS + turn)  # fmt: skip
        for i, (talk, problem) in enumerate(zip(talks, problems, strict=True)):
            line = said[i].split("\n")[0].strip()
            right = task.apply(states[i], problem.ops[turn])
            rewards[i, turn] = float(line == task.line(states[i], problem.ops[turn], right))
            states[i] = right  # the user corrects a wrong turn
            talk.append((line + " \n ", True))
    return talks, rewards


def batch_of(talks):
    ids, steps = [], []
    for talk in talks:
        row, where, turn = [], [], -1
        for text, mine in talk:
            tokens, turn = tokenizer(text).input_ids, turn + mine
            row, where = row + tokens, where + [turn if mine else -1] * len(tokens)
        ids.append(torch.tensor(row)), steps.append(torch.tensor(where))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids, step_ids = pad(ids, batch_first=True), pad(steps, batch_first=True, padding_value=-1)
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    layout = StepLayout.from_step_ids(input_ids.masked_fill(step_ids < 0, -100), step_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}, layout


rows = []
for k in range(UPDATES):
    problems = [p for p in task.problems(2 * PROMPTS, seed=100 + k, held_out=False) if len(p.ops) >= TURNS][:PROMPTS]
    problems = [p for p in problems for _ in range(SAMPLES)]
    talks, rewards = converse(problems, seed=k)
    to_come = rewards.clone()
    for turn in reversed(range(TURNS - 1)):
        to_come[:, turn] += GAMMA * to_come[:, turn + 1]
    groups = to_come.view(-1, SAMPLES, TURNS)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()  # (S,): turn by turn of each conversation
    inputs, layout = batch_of(talks)
    out = step_policy_loss(model.train()(**inputs).logits, layout, advantages, loss_type="ppo", aggregation="step")
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if k in (0, UPDATES - 1):
        rows.append({"update": k + 1} | {f"turn {t + 1} right": rewards[:, t].mean().item() for t in range(TURNS)}
                    | {"all right": rewards.all(1).float().mean().item(), "turns": layout.num_steps})  # fmt: skip
print(table(rows))
