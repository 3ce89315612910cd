# SPDX-License-Identifier: Apache-2.0
"""SRPO: one model learns to answer and to revise an answer that it is shown, from the same pairs.

The revision sees the question and a first answer. Its best form is pi'(y2 | y1) ~ ref(y2 | y1) exp(P(y2 > y1) / beta),
and that of the answers is then pi(y) ~ ref(y) pi'(y | y) / ref(y | y): an answer is likely if the revision would keep
it. Both are differences of log-ratios over a pair, so both are squares of step log-probs, without a partition sum.

Shows: the mean of the squares, and sampled accuracy on other problems of first answers and of their revisions, before
    and after. One seed and few updates, so that some points either way are noise: this shows how the loss is made, not
    that it helps.

System: SRPO
Paper: arXiv 2406.01660
Changes: a min-max of an answering and a revising policy, as one offline least-squares loss
Ours: the two squares are derived from the paper's objective as above and weighted equally (its own form was not read);
    a first answer is shown after the question, with "wait let me think again" between
"""

import copy

import torch

from sspo_ext import step_logps
from sspo_ext.demo.play import Task, complete, load_start, policy_batch, sampled_pairs, sized, table, train

BETA, P = 0.5, 1.0  # P: the probability that a right answer is preferred
task = Task("sums")
start, tokenizer = load_start()
AGAIN = " \n wait let me think again \n "
rows = sampled_pairs(start, tokenizer, task, task.problems(sized(120, 24), seed=1, held_out=False), samples=6)
held_out = task.problems(sized(150, 10), seed=2, held_out=True)


def shown(prompt, answer):
    return prompt + answer.rstrip() + AGAIN


# the start model has seen no revision: a few updates on right answers after any answer make it write some
sft = [(shown(r["prompt"], r[side]), r["chosen"]) for r in rows for side in ("chosen", "rejected")]
sft += [(r["prompt"], r["chosen"]) for r in rows]


def collate_sft(some):
    return policy_batch(tokenizer, [prompt for prompt, _ in some], [[text] for _, text in some])


train(start, sft, lambda b: -step_logps(start(**b["inputs"]).logits, b["layout"]).means.mean(), updates=sized(40, 2),
      lr=2e-4, collate=collate_sft)  # fmt: skip
reference = copy.deepcopy(start)


def collate(some):
    """For y1 rejected and y2 chosen: y1, y2, y1 | y1, y2 | y1, y2 | y2, y1 | y2, each of all rows."""
    bad, good = ([r[side] for r in some] for side in ("rejected", "chosen"))
    ask = [r["prompt"] for r in some]
    after_bad, after_good = ([shown(p, y) for p, y in zip(ask, ys, strict=True)] for ys in (bad, good))
    prompts = ask + ask + after_bad * 2 + after_good * 2
    return policy_batch(tokenizer, prompts, [[y] for y in bad + good + bad + good + good + bad])


def loss(batch):
    with torch.no_grad():
        ref = step_logps(reference(**batch["inputs"]).logits, batch["layout"]).sums
    u = step_logps(start(**batch["inputs"]).logits, batch["layout"]).sums - ref
    bad, good, bad_bad, good_bad, good_good, bad_good = (BETA * u).chunk(6)
    revise = (good_bad - bad_bad - (P - 0.5)).square() + (bad_good - good_good - (0.5 - P)).square()
    answer = (good - bad - (good_good - bad_bad)).square()
    return (revise + answer).mean()


def accuracies(model):
    first = complete(model, tokenizer, [p.prompt for p in held_out])
    second = complete(model, tokenizer, [shown(p.prompt, y) for p, y in zip(held_out, first, strict=True)], seed=1)
    return [sum(task.reward(p.prompt, y, p.answer) for p, y in zip(held_out, ys, strict=True)) / len(held_out)
            for ys in (first, second)]  # fmt: skip


before = accuracies(start)
squares = train(start, rows, loss, updates=sized(40, 2), batch_size=8, lr=2e-4, collate=collate)
found = []
for name, some, (first, second) in (("before", squares[:8], before), ("after", squares[-8:], accuracies(start))):
    found.append({"": name, "squares": sum(some) / len(some), "first answer": first, "revision": second})
print(table(found))
