# SPDX-License-Identifier: Apache-2.0
"""Plain DPO in three lines, on pairs of the model's own completions.

One step per response makes the step-wise loss DPO. The three lines are in `loss`.

Shows: the margin of the rewards grows and most pairs are ranked right; the model samples more right answers to
    problems that are in no training, and fewer greedily.

System: DPO
Paper: arXiv 2305.18290
Changes: nothing; the others are told by their difference to it
Ours: the small model, the task, and pairs that the model sampled itself
"""

import copy

import torch

from sspo_ext import step_logps, step_pref_loss
from sspo_ext.demo.play import Task, features, load_start, sampled_pairs, score, sized, table, train

task = Task("sums")  # 6 + 13 + 7 = ?  The model writes a line for each addition, and slips
model, tokenizer = load_start()
reference = copy.deepcopy(model)
problems = task.problems(sized(160, 24), seed=1, held_out=False)
held_out = task.problems(sized(200, 10), seed=2, held_out=True)
rows = features(sampled_pairs(model, tokenizer, task, problems), tokenizer, pair_by="sequence")


def loss(batch):
    layout, pairs = batch["layout"], batch["pairs"]
    with torch.no_grad():
        ref = step_logps(reference(**batch["inputs"]).logits, layout).sums
    out = step_pref_loss(model(**batch["inputs"]).logits, layout, pairs, ref=ref, beta=0.5)
    seen.append(out)
    return out.loss


seen = []
before = score(model, tokenizer, task, held_out)
train(model, rows, loss, updates=sized(40, 2))
after = score(model, tokenizer, task, held_out)
rows = []
for name, out, held in (("before", seen[0], before), ("after", seen[-1], after)):
    metrics = {
        "margin": out.metrics["rewards/margins"].item(),
        "ranked right": out.metrics["rewards/accuracies"].item(),
    }
    rows.append({"": name, **metrics, **held})
print(table(rows))
