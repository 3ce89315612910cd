# SPDX-License-Identifier: Apache-2.0
"""Rounds of sampling, grading, pairing and DPO: each round's pairs are the model's own.

Every round the model completes new problems. Right beats wrong; where all are right, the shortest
beats the longest. The model of the round before is the reference.

Shows: with every round more sampled completions are right and they get shorter, and greedily fewer are right. One
    round with all problems and as many updates does worse.

System: WebThinker
Paper: arXiv 2504.21776
Changes: iterative online DPO: pairs of own trajectories by correctness, then by tool use, then by conciseness
Ours: its training alone, without tools or web; conciseness counts where all are right
"""

import copy

from sspo_ext.demo.play import Task, dpo, features, load_start, sampled, score, sized, table

task = Task("sums")
start, tokenizer = load_start()
ROUNDS, PROBLEMS, UPDATES = 3, sized(80, 16), sized(20, 2)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)


def pairs_of(model, problems, seed):
    rows = []
    for problem, group in zip(problems, sampled(model, tokenizer, task, problems, seed=seed), strict=True):
        right = [text for text, reward in group if reward]
        wrong = [text for text, reward in group if not reward]
        if right and wrong:
            rows.append({"prompt": problem.prompt, "chosen": right[0], "rejected": wrong[0]})
        elif right:
            short, *_, long = sorted(right, key=lambda text: len(text.split()))
            rows += [{"prompt": problem.prompt, "chosen": short, "rejected": long}] if short != long else []
    return features(rows, tokenizer, pair_by="sequence")


found = [{"after": "start", "pairs": 0, **score(start, tokenizer, task, held_out)}]
all_problems = task.problems(ROUNDS * PROBLEMS, seed=1, held_out=False)
model = copy.deepcopy(start)
for k in range(ROUNDS):
    rows = pairs_of(model, all_problems[k * PROBLEMS : (k + 1) * PROBLEMS], seed=k)
    dpo(model, copy.deepcopy(model), rows, updates=UPDATES, seed=k)
    found.append({"after": f"round {k + 1}", "pairs": len(rows), **score(model, tokenizer, task, held_out)})
once = copy.deepcopy(start)
rows = pairs_of(once, all_problems, seed=0)
dpo(once, start, rows, updates=ROUNDS * UPDATES)
found.append({"after": "one long round", "pairs": len(rows), **score(once, tokenizer, task, held_out)})
print(table(found))
