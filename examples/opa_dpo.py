# SPDX-License-Identifier: Apache-2.0
"""OPA-DPO: an expert corrects the model's own responses, and these are made on-policy before DPO.

The expert mends a wrong completion with few changes: lines stay as the model wrote them as long as each is the next
right one or says nothing in numbers, and the rest is written rightly. Supervised training on own and corrected
responses makes both likely; that model is the start and the reference of DPO.

Shows: the alignment makes corrected responses likelier under the reference of DPO, and DPO from there leaves more right
    answers to other problems, greedy and sampled, than DPO from the start model.

System: OPA-DPO
Paper: arXiv 2501.09695
Changes: supervised training on own and expert-corrected responses, then DPO from there
Ours: text alone, so no terms on images; the expert is the task; full weights in place of LoRA
"""

import copy

import torch

from sspo_ext import step_logps
from sspo_ext.demo.play import Task, dpo, features, load_start, policy_batch, sampled, score, sized, table, train

task = Task("sums")
start, tokenizer = load_start()
problems = task.problems(sized(160, 24), seed=1, held_out=False)
held_out = task.problems(sized(150, 10), seed=2, held_out=True)


def corrected(problem, text):
    """The model's lines up to the first that is not the next right one, and the shortest way from there."""
    kept, state, done = [], problem.start, 0
    for line in (line.strip() for line in text.split("\n")):
        if done < len(problem.ops) and line == task.line(
            state, problem.ops[done], right := task.apply(state, problem.ops[done])
        ):
            state, done = right, done + 1
        elif any(word.isdigit() for word in line.split()):
            break  # a wrong line, a repetition or an early answer
        kept.append(line)
    for op in problem.ops[done:]:
        kept.append(task.line(state, op, state := task.apply(state, op)))
    return " \n ".join([line for line in kept if line] + [task.answer_line(problem.answer)])


rows = [
    {"prompt": p.prompt, "chosen": corrected(p, text), "rejected": text}
    for p, group in zip(problems, sampled(start, tokenizer, task, problems, samples=4), strict=True)
    for text in [next((t for t, reward in group if not reward), None)] if text
]  # fmt: skip
rows_of = features(rows, tokenizer, pair_by="sequence")
texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def likelihood(model, of):
    batch = policy_batch(tokenizer, [prompt for prompt, _ in of], [[text] for _, text in of])
    return batch, step_logps(model(**batch["inputs"]).logits, batch["layout"]).means


aligned = copy.deepcopy(start)
train(aligned, texts, lambda some: -likelihood(aligned, some)[1].mean(), updates=sized(40, 2), collate=list)
found = []
for name, reference in (("DPO from the start model", start), ("OPA-DPO", aligned)):
    with torch.no_grad():
        chosen = likelihood(reference, texts[::2])[1].mean().item()
    model = copy.deepcopy(reference)
    begun = score(model, tokenizer, task, held_out)
    dpo(model, reference, rows_of, updates=sized(40, 2))
    found.append({"": name + ", before", "log-prob of corrected": chosen, **begun})
    found.append({"": name + ", after", "log-prob of corrected": "", **score(model, tokenizer, task, held_out)})
print(table(found))
