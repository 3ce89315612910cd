# SPDX-License-Identifier: Apache-2.0
"""A LoRA model on the linear route: the loss starts from hidden states, and the logits never exist.

With an adapter the LM head is frozen, and the reference is the model with the adapter switched off. `peft` is needed.

Shows: the same loss from logits and from hidden states at the start (log 2, since a new adapter changes nothing), what
    the adapter learns, and how many logits either route has in memory at once.
"""

import torch
from peft import LoraConfig, get_peft_model

from sspo_ext import linear_step_logps, linear_step_pref_loss, step_logps, step_pref_loss
from sspo_ext.demo.play import Task, features, load_start, sampled_pairs, score, sized, table, train
from sspo_ext.hf import forward_hidden, model_head

task = Task("sums")
base, tokenizer = load_start()
problems = task.problems(sized(160, 24), seed=1, held_out=False)
held_out = task.problems(sized(200, 10), seed=2, held_out=True)
rows = features(sampled_pairs(base, tokenizer, task, problems), tokenizer, pair_by="sequence")
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
CHUNK = 1 << 18  # bytes of logits at once


def from_hidden(batch):
    layout, pairs, inputs = batch["layout"], batch["pairs"], batch["inputs"]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.disable_adapter():
        hidden, _ = forward_hidden(model, **inputs)
        head = model_head(model)
        ref = linear_step_logps(hidden, head.weight, layout, **head.options, chunk_bytes=CHUNK).sums
    hidden, outputs = forward_hidden(model, **inputs)
    options = {"ref": ref, "beta": 0.5, "chunk_bytes": CHUNK}
    out = linear_step_pref_loss(hidden, head.weight, layout, pairs, **options, **head.options)
    made = outputs.logits.numel() * 4 + CHUNK
    seen.append(("hidden states", out.loss.item(), out.metrics["rewards/margins"].item(), made))
    return out.loss


def from_logits(batch):
    layout, pairs = batch["layout"], batch["pairs"]
    with torch.no_grad(), model.disable_adapter():
        ref = step_logps(model(**batch["inputs"]).logits, layout).sums
    logits = model(**batch["inputs"]).logits
    out = step_pref_loss(logits, layout, pairs, ref=ref, beta=0.5)
    seen.append(("logits", out.loss.item(), out.metrics["rewards/margins"].item(), logits.numel() * 4))
    return out.loss


seen = []
before = score(model, tokenizer, task, held_out)
train(model, rows, from_logits, updates=1, lr=0.0)
train(model, rows, from_hidden, updates=sized(40, 2), lr=1e-3)
after = score(model, tokenizer, task, held_out)
rows = []
for k, held in ((0, before), (1, before), (len(seen) - 1, after)):
    kind, loss, margin, made = seen[k]
    numbers = {"loss": loss, "margin": margin, "bytes of logits, at most": made}
    rows.append({"update": max(k, 1), "loss from": kind, **numbers, **held})
print(table(rows))
