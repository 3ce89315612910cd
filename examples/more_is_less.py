# SPDX-License-Identifier: Apache-2.0
"""Whose responses make the pairs: the model's own, a stronger model's, or a mixture.

The stronger writer is the task itself, whose solutions are right and short. Rejected responses are always the model's
own.

Shows: pairs with a stronger writer's responses can be told apart by length, and the model's own cannot. Right answers
    gain as much either way, and length falls with the stronger writer: what the paper finds for safety is not seen in
    this task.

System: More is less
Paper: arXiv 2504.02193
Changes: the choice of data: own responses for both sides against a stronger or several models' responses
Ours: arithmetic in place of safety, and length as the superficial cue
"""

import copy

from sspo_ext.demo.play import Task, dpo, features, load_start, sampled, score, sized, table

task = Task("sums")
start, tokenizer = load_start()
problems = task.problems(sized(160, 24), seed=1, held_out=False)
held_out = task.problems(sized(150, 10), seed=2, held_out=True)
own, strong = [], []
for problem, group in zip(problems, sampled(start, tokenizer, task, problems), strict=True):
    right, wrong = ([text for text, reward in group if reward == r] for r in (1.0, 0.0))
    if right and wrong:
        row = {"prompt": problem.prompt, "rejected": wrong[0]}
        own.append(row | {"chosen": right[0]})
        strong.append(row | {"chosen": " \n ".join(task.minimal(problem))})
mixed = [pair[i % 2] for i, pair in enumerate(zip(own, strong, strict=True))]


def told_by_length(rows):
    """The best share of responses that a threshold on their length puts on the right side."""
    sides = [(len(row[side].split()), side == "chosen") for row in rows for side in ("chosen", "rejected")]
    return max(sum((n <= cut) == chosen for n, chosen in sides) / len(sides) for cut, _ in sides)


found = [
    {"chosen from": "(start)", "told by length": "", "ranked right": "", **score(start, tokenizer, task, held_out)}
]
for name, rows in (("itself", own), ("a stronger writer", strong), ("half and half", mixed)):
    model = copy.deepcopy(start)
    rows_of = features(rows, tokenizer, pair_by="sequence")
    ranked = dpo(model, start, rows_of, updates=sized(40, 2)).metrics["rewards/accuracies"].item()
    found.append({"chosen from": name, "told by length": told_by_length(rows), "ranked right": ranked,
                  **score(model, tokenizer, task, held_out)})  # fmt: skip
print(table(found))
