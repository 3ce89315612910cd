# SPDX-License-Identifier: Apache-2.0
"""OFS-DPO and COFS-DPO: a fast and a slow LoRA adapter, and fast adapters of several domains merged.

Both adapters learn the same pairs, the slow one at a lower rate. The fast one's loss has a term that keeps it ahead of
the slow one in the probability of the preference. After a domain the fast adapter is kept. The next domain is sums
with other numbers. COFS-DPO adds the kept adapters up, with weights that fit a few pairs of both domains. `peft` is
needed.

Shows: after the second domain the fast adapter ranks fewer pairs of the first one right. The merged one does well in
    both.

System: OFS-DPO, COFS-DPO
Paper: arXiv 2406.05534
Changes: two LoRA modules of different speed and a term on their gap; a linear combination over domains
Ours: the term is -log sig of the gap of the two margins; the weights of the combination come from a small grid
"""

import random

import torch
from peft import LoraConfig, get_peft_model

from sspo_ext import step_logps
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.demo.play import Task, features, load_start, sized, table

BETA, GAP = 0.1, 0.1
task = Task("sums")
base, tokenizer = load_start()
torch.manual_seed(0)
config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
model = get_peft_model(base, config, adapter_name="fast")
model.add_adapter("slow", config)


def pairs_of(domain, problems):
    """Right solutions against ones with another answer, or without their first line."""
    rows = []
    for p in problems:
        right = task.minimal(p)
        wrong = [*right[:-1], task.answer_line(str(int(p.answer) + 10))] if domain == "wrong answer" else right[1:]
        rows.append({"prompt": p.prompt, "chosen": " \n ".join(right), "rejected": " \n ".join(wrong)})
    return features(rows, tokenizer, pair_by="sequence")


DOMAINS = ("wrong answer", "step left out")
problems = task.problems(sized(160, 24), seed=1, held_out=False)
train_rows = {d: pairs_of(d, problems[:-40] or problems) for d in DOMAINS}
tests = {d: pairs_of(d, task.problems(sized(60, 8), seed=2, held_out=True)) for d in DOMAINS}


def margin_of(batch, adapter):
    """beta (u_w - u_l) of each pair under an adapter; the reference is the model without any."""
    with torch.no_grad(), model.disable_adapter():
        ref = step_logps(model(**batch["inputs"]).logits, batch["layout"])
    model.set_adapter(adapter)
    logps = step_logps(model(**batch["inputs"]).logits, batch["layout"])
    winner, loser = batch["pairs"].index.long().unbind(1)
    u = logps.sums - ref.sums
    return BETA * (u[winner] - u[loser])


def learn(domain, updates, lr):
    named = list(model.named_parameters())
    groups = [([p for n, p in named if f".{name}." in n], rate) for name, rate in (("fast", lr), ("slow", lr / 5))]
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.0)
    logsigmoid, order = torch.nn.functional.logsigmoid, random.Random(0)
    for _ in range(updates):
        batch = batch_of(order.sample(train_rows[domain], 16))
        slow = margin_of(batch, "slow")
        (-logsigmoid(slow).mean()).backward()
        fast = margin_of(batch, "fast")
        (-logsigmoid(fast).mean() - GAP * logsigmoid(fast - slow.detach()).mean()).backward()
        for parameters, _ in groups:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def batch_of(rows):
    batch = StepPreferenceCollator(0)(rows)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    return batch | {"inputs": inputs}


def measured(adapter, rows):
    batch = batch_of(rows)
    with torch.no_grad():
        margin = margin_of(batch, adapter)
    return -torch.nn.functional.logsigmoid(margin).mean().item(), (margin > 0).float().mean().item()


def row_of(name, adapter):
    numbers = {d: measured(adapter, tests[d]) for d in DOMAINS}
    return {"adapter": name} | {
        f"{d}: {what}": numbers[d][i] for d in DOMAINS for i, what in enumerate(("loss", "right"))
    }


found, kept = [], []
for domain in DOMAINS:
    learn(domain, sized(30, 2), lr=1e-3)
    name = domain.replace(" ", "_")
    model.add_weighted_adapter(["fast"], [1.0], name, combination_type="linear")
    kept.append(name)
    found.append(row_of(f"fast, after {domain}", name))
few = {d: train_rows[d][:8] for d in DOMAINS}  # the memory of each domain
for percent in (25, 50, 75):
    share = percent / 100
    model.add_weighted_adapter(kept, [1 - share, share], f"merged_{percent}", combination_type="linear")
best = min((25, 50, 75), key=lambda percent: sum(measured(f"merged_{percent}", few[d])[0] for d in DOMAINS))
found.append(row_of(f"merged, {best} % of the second", f"merged_{best}"))
print(table(found))
