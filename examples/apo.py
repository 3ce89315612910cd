# SPDX-License-Identifier: Apache-2.0
"""APO: Nesterov's step between the rounds of iterative DPO.

After each round the weights go on in the direction of that round: model + alpha (model - model of the round before,
before its own step). The next round samples from there, and its reference is that model.

Shows: accuracy and length on other problems after every round, with alpha = 0 (iterative DPO) and with the step.

System: APO (accelerated)
Paper: arXiv 2410.06293
Changes: an extrapolation between rounds: policy x (policy / policy before)^alpha
Ours: the extrapolation is one of weights, which is that of the policies where log-probs are linear in the weights
"""

import copy

import torch

from sspo_ext.demo.play import Task, dpo, features, load_start, sampled_pairs, score, sized, table

task = Task("sums")
start, tokenizer = load_start()
ROUNDS, PROBLEMS, UPDATES = 3, sized(80, 16), sized(15, 2)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)
found = [{"alpha": "start", "round": 0, **score(start, tokenizer, task, held_out)}]
for alpha in (0.0, 0.5):
    model, before = copy.deepcopy(start), copy.deepcopy(start)
    for k in range(ROUNDS):
        problems = task.problems(PROBLEMS, seed=10 + k, held_out=False)
        rows = features(sampled_pairs(model, tokenizer, task, problems, seed=k), tokenizer, pair_by="sequence")
        dpo(model, copy.deepcopy(model), rows, updates=UPDATES, seed=k)
        found.append({"alpha": alpha, "round": k + 1, **score(model, tokenizer, task, held_out)})
        with torch.no_grad():
            for now, old in zip(model.parameters(), before.parameters(), strict=True):
                found_by_dpo = now.clone()
                now += alpha * (now - old)
                old.copy_(found_by_dpo)
print(table(found))
