# SPDX-License-Identifier: Apache-2.0
"""DenseDPO's idea for text: two aligned responses, and every segment has a winner of its own.

Two solutions of a problem have the same lines, and each slips in another one. Both end wrong, so no label of the whole
response can tell them apart. Line against line one is right: `StepPairs` takes (winner, loser) in any direction.

Shows: with labels of segments nearly all lines of other pairs are ranked right, and with one label for the whole
    response (the one that slips later wins) about half of them; accuracy and length on other problems stand beside
    it.

System: DenseDPO (text analogue)
Paper: arXiv 2506.03517
Changes: labels for short aligned segments in place of one for the whole
Ours: lines of text in place of seconds of video, and slips that are written in at random
"""

import copy
import random

import torch

from sspo_ext import StepPairs, step_logps, step_pref_loss
from sspo_ext.demo.play import Task, load_start, policy_batch, score, sized, table, train

task, rng = Task("sums"), random.Random(0)
start, tokenizer = load_start()


def solution(problem, slip):
    """Lines of which number `slip` has a wrong result and is carried on from there; and whether each is right."""
    lines, state = [], problem.start
    for i, op in enumerate(problem.ops):
        lines.append(
            task.line(state, op, state := task.apply(state, op) + (rng.choice([-1, 1, 2]) if i == slip else 0))
        )
    return [line + " \n " for line in lines] + [task.answer_line(str(state))]


def aligned(problems):
    """(prompt, one, other, first, second): line `first` of one slips, line `second` of the other."""
    rows = []
    for p in problems:
        first, second = rng.sample(range(len(p.ops)), 2)
        rows.append((p.prompt, solution(p, first), solution(p, second), first, second))
    return rows


def collate(some):
    """Rows [one .., other ..]; line k against line k where one is right and the other is not."""
    batch = policy_batch(tokenizer, [r[0] for r in some] * 2, [r[1] for r in some] + [r[2] for r in some])
    counts = [len(r[1]) for r in some] * 2
    begin = torch.tensor([0, *counts]).cumsum(0).tolist()
    dense, whole = [], []
    for i, (_, one, _, first, second) in enumerate(some):
        a, b = begin[i], begin[len(some) + i]
        dense += [[b + first, a + first], [a + second, b + second]]
        later_slip_wins = [a, b] if first > second else [b, a]
        whole += [[later_slip_wins[0] + k, later_slip_wins[1] + k] for k in range(len(one) - 1)]
    layout = batch["layout"]
    return batch | {
        name: StepPairs.from_index(layout, torch.tensor(p)) for name, p in (("dense", dense), ("whole", whole))
    }


def loss_on(labels, model, batch):
    with torch.no_grad():
        ref = step_logps(start(**batch["inputs"]).logits, batch["layout"]).sums
    return step_pref_loss(model(**batch["inputs"]).logits, batch["layout"], batch[labels], ref=ref, beta=0.5)


rows, others = (
    aligned(task.problems(sized(n, 16), seed=s, held_out=h)) for n, s, h in ((200, 1, False), (100, 3, True))
)
held_out, test = task.problems(sized(100, 10), seed=2, held_out=True), collate(others)
found = [{"labels": "start", "lines ranked right": "", **score(start, tokenizer, task, held_out)}]
for name, labels in (("of segments", "dense"), ("of the whole", "whole")):
    model = copy.deepcopy(start)
    train(model, rows, lambda b: loss_on(labels, model, b).loss, updates=sized(40, 2), collate=collate)  # noqa: B023
    with torch.no_grad():
        ranked = loss_on("dense", model, test).metrics["rewards/accuracies"].item()
    found.append({"labels": name, "lines ranked right": ranked, **score(model, tokenizer, task, held_out)})
print(table(found))
