# SPDX-License-Identifier: Apache-2.0
"""DPO by step, with boundaries of one's own.

A step is whatever a list in a row says it is. Here a line "6 + 13 = 19" is two steps, the question it asks and its
result, and only the first step that is wrong is compared: `branch` is the number of steps before it. The same rows
with one step a response are plain DPO.

Shows: by step a tenth of the tokens is scored. The solutions are not the model's own, and DPO on whole responses costs
    accuracy on other problems; by step much less is lost.

System: Step-DPO
Paper: arXiv 2406.18629
Changes: a pair is one step after a shared beginning
Ours: the boundaries, and slips that are written into right solutions at random
"""

import copy
import random

from sspo_ext.demo.play import Task, dpo, features, load_start, score, sized, table

task, rng = Task("sums"), random.Random(0)
start, tokenizer = load_start()


def steps_of(line):
    question, _, result = line.rpartition(" ")
    return [question + " ", result + " \n "]


def row_of(problem):
    """The shortest right solution, and one whose line k has a wrong result and is carried on from there."""
    k, state = rng.randrange(len(problem.ops)), problem.start
    chosen, rejected, wrong = [], [], problem.start
    for i, op in enumerate(problem.ops):
        chosen += steps_of(task.line(state, op, state := task.apply(state, op)))
        rejected += steps_of(task.line(wrong, op, wrong := task.apply(wrong, op) + rng.choice([-1, 1, 10]) * (i == k)))
    ends = [task.answer_line(str(s)) for s in (state, wrong)]
    return {
        "prompt": problem.prompt,
        "chosen": [*chosen, ends[0]],
        "rejected": [*rejected, ends[1]],
        "branch": 2 * k + 1,
    }


rows = [row_of(p) for p in task.problems(sized(200, 16), seed=1, held_out=False)]
held_out = task.problems(sized(200, 10), seed=2, held_out=True)
found = [{"": "start", "pairs": "", "scored tokens": "", "margin": 0.0, **score(start, tokenizer, task, held_out)}]
for name, pair_by in (("whole responses", "sequence"), ("my own steps", "branch")):
    rows_of = features(rows, tokenizer, pair_by=pair_by)
    model = copy.deepcopy(start)
    out = dpo(model, start, rows_of, updates=sized(40, 2))
    tokens = sum(label >= 0 for row in rows_of for label in row["chosen_labels"]) / len(rows_of)
    numbers = {"pairs": len(rows_of), "scored tokens": tokens, "margin": out.metrics["rewards/margins"].item()}
    found.append({"": name, **numbers, **score(model, tokenizer, task, held_out)})
print(table(found))
