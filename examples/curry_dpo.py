# SPDX-License-Identifier: Apache-2.0
"""Curry-DPO: several pairs of one prompt, from far apart to close, and a new reference at every stage.

Each problem has four completions, ranked by reward: right or wrong, and shorter is better. The best is paired with
each of the others. Far apart is easy. `CurriculumSampler` orders the rows.

Shows: accuracy and length on other problems for the same pairs and updates: shuffled, from easy to hard, and from easy
    to hard with the model as the next stage's reference.

System: Curry-DPO
Paper: arXiv 2403.07230
Changes: the order of pairs, from the largest gap of scores to the smallest, and the reference after each stage
Ours: the score; three stages of equal size
Test: `tests/data/test_curriculum.py`
"""

import copy

from sspo_ext.data.curriculum import CurriculumSampler
from sspo_ext.demo.play import Task, dpo, features, load_start, sampled, score, sized, table

task = Task("sums")
start, tokenizer = load_start()
STAGES, UPDATES = 3, sized(15, 1)
problems = task.problems(sized(100, 12), seed=1, held_out=False)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)
rows, gaps = [], []
for problem, group in zip(problems, sampled(start, tokenizer, task, problems, samples=4), strict=True):
    ranked = sorted(((reward - len(text.split()) / 200, text) for text, reward in group), reverse=True)
    for value, text in ranked[1:]:
        if ranked[0][1] != text:
            rows.append({"prompt": problem.prompt, "chosen": ranked[0][1], "rejected": text})
            gaps.append(ranked[0][0] - value)
rows = features(rows, tokenizer, pair_by="sequence")
stages = CurriculumSampler([-gap for gap in gaps], stages=STAGES).stage_rows
found = [{"order": "start", "gap, first stage": "", "gap, last stage": "", **score(start, tokenizer, task, held_out)}]
for name, in_order, new_reference in (
    ("shuffled", False, False), ("easy to hard", True, False), ("easy to hard, new references", True, True),
):  # fmt: skip
    model, reference = copy.deepcopy(start), start
    used = stages if in_order else [list(range(len(rows)))] * STAGES
    for k, stage in enumerate(used):
        dpo(model, reference, [rows[i] for i in stage], updates=UPDATES, seed=k)
        reference = copy.deepcopy(model) if new_reference else reference
    first, last = (sum(gaps[i] for i in stage) / len(stage) for stage in (used[0], used[-1]))
    found.append({"order": name, "gap, first stage": first, "gap, last stage": last,
                  **score(model, tokenizer, task, held_out)})  # fmt: skip
print(table(found))
