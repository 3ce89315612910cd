# SPDX-License-Identifier: Apache-2.0
"""Losses of more than a pair: several completions of each problem, with rewards, levels or a gold answer.

Each problem has six completions by the start model, and the shortest right solution as gold.

Shows: accuracy and length on other problems after the same number of updates. One seed: this ranks nothing.

System: BRAIn
Paper: arXiv 2402.02479
Changes: the policy's self-normalised weights over samples are pulled to the reward's posterior
Ours: samples come from the reference, so that the posterior over a group is softmax(reward / temperature), and the
    gradient is that of `listwise_loss` with beta = 1

System: TRPA
Paper: arXiv 2504.04524
Changes: pairs between levels of answers, which rules decide, on token means
Ours: the levels: right, wrong, without an answer

System: Triple PO
Paper: arXiv 2405.16681
Changes: a gold response beside the pair is imitated, without a reference
"""

import copy

import torch

from sspo_ext import step_logps, step_pref_loss
from sspo_ext.demo.play import Task, load_start, policy_batch, sampled, score, sized, table, train
from sspo_ext.losses import level_pairs, listwise_loss, tpo_loss, trpa_loss

SAMPLES = 6
task = Task("sums")
start, tokenizer = load_start()
problems = task.problems(sized(128, 16), seed=1, held_out=False)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)
graded = sampled(start, tokenizer, task, problems, samples=SAMPLES)
groups = [(p, g) for p, g in zip(problems, graded, strict=True) if len({reward for _, reward in g}) == 2]


def level(text, reward):
    return 1 if reward else 2 if task.probe in text else 3


def collate(some):
    """SAMPLES completions and one gold solution of each problem, one step each."""
    texts = [[*(text for text, _ in group), " \n ".join(task.minimal(p))] for p, group in some]
    prompts = [p.prompt for p, _ in some for _ in range(SAMPLES + 1)]
    batch = policy_batch(tokenizer, prompts, [[text] for group in texts for text in group])
    number = torch.arange(len(prompts)).view(len(some), SAMPLES + 1)
    levels = torch.tensor([[*(level(*one) for one in group), 0] for _, group in some])  # 0: the gold, in no pair
    rewards = torch.tensor([[reward for _, reward in group] for _, group in some])
    group_of = torch.arange(len(some)).repeat_interleave(SAMPLES + 1)
    return batch | {"lists": number[:, :-1], "gold": number[:, -1], "levels": levels.flatten(), "rewards": rewards,
                    "groups": group_of}  # fmt: skip


def pairs_of(b):
    return level_pairs(b["levels"], b["groups"])


losses = {
    "DPO on all pairs": lambda logits, ref, b: step_pref_loss(logits, b["layout"], pairs_of(b)[0], ref=ref, beta=0.5),
    "BRAIn": lambda logits, ref, b: listwise_loss(
        step_logps(logits, b["layout"]),
        b["layout"],
        b["lists"],
        b["rewards"],
        ref=ref,
        beta=1.0,
        score_temperature=0.25,
    ),
    "TRPA": lambda logits, ref, b: trpa_loss(
        step_logps(logits, b["layout"]), b["layout"], *pairs_of(b), ref=ref, beta=2.0
    ),
    "Triple PO": lambda logits, ref, b: tpo_loss(
        step_logps(logits, b["layout"]), b["layout"], pairs_of(b)[0], b["gold"], beta=0.1, tpo_alpha=1.0
    ),
}
found = [{"loss": "start", **score(start, tokenizer, task, held_out)}]
for name, of_logits in losses.items():
    model = copy.deepcopy(start)

    def loss(batch, model=model, of_logits=of_logits):
        with torch.no_grad():
            ref = step_logps(start(**batch["inputs"]).logits, batch["layout"])
        return of_logits(model(**batch["inputs"]).logits, ref, batch).loss

    train(model, groups, loss, updates=sized(40, 2), batch_size=8, collate=collate)
    found.append({"loss": name, **score(model, tokenizer, task, held_out)})
print(table(found))
