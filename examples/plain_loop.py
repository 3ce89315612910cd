# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch loop from raw text to updates: nothing of the trainers, nothing undefined.

Texts become token ids, step ids, padded batches, a reference, a loss by step, an update. Replace the model by
`AutoModelForCausalLM.from_pretrained(NAME)` and the texts by yours, and it is your loop.

Shows: loss, margin and the share of steps ranked right of every epoch on eight pairs of solutions.
"""

import copy

import torch

from sspo_ext import StepLayout, step_logps, step_pref_loss
from sspo_ext.demo.play import load_start, table
from sspo_ext.signals import split_text, token_step_ids

model, tokenizer = load_start()
reference = copy.deepcopy(model).eval()
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device), reference.to(device)

SUMS = [(6, 13, 7), (9, 8, 2), (3, 14, 5), (11, 4, 9), (12, 12, 3), (7, 8, 9), (2, 15, 8), (10, 5, 6)]
pairs_of_texts = []  # (prompt, chosen, rejected): a line is a step
for a, b, c in SUMS:
    right = f"{a} + {b} = {a + b} \n {a + b} + {c} = {a + b + c} \n #### {a + b + c}"
    wrong = f"{a} + {b} = {a + b} \n {a + b} + {c} = {a + b + c - 1} \n #### {a + b + c - 1}"
    pairs_of_texts.append((f"{a} + {b} + {c} = ? \n", right, wrong))


def encode(prompt, response):
    """Token ids of the two, with the end of sequence, and a step id for every token: -1 in the prompt."""
    head = tokenizer(prompt).input_ids
    tail = tokenizer(response, return_offsets_mapping=True)
    steps = token_step_ids(response, tail.offset_mapping, split_text(response))
    ids = head + tail.input_ids + [tokenizer.eos_token_id]
    return torch.tensor(ids), torch.tensor([-1] * len(head) + list(steps) + [max(steps)])


def collate(some):
    """A padded batch [chosen .., rejected ..], its layout of steps, and the pairs: step k against step k."""
    sides = [encode(prompt, chosen) for prompt, chosen, _ in some] + [
        encode(prompt, wrong) for prompt, _, wrong in some
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([ids for ids, _ in sides], batch_first=True, padding_value=tokenizer.pad_token_id)
    step_ids = pad([steps for _, steps in sides], batch_first=True, padding_value=-1)
    mask = pad([torch.ones_like(ids) for ids, _ in sides], batch_first=True)
    layout = StepLayout.from_step_ids(input_ids.masked_fill(step_ids < 0, -100), step_ids)
    return {"input_ids": input_ids, "attention_mask": mask}, layout, layout.pair_by_index()


loader = torch.utils.data.DataLoader(
    pairs_of_texts, batch_size=4, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
rows = []
for epoch in range(8):
    model.train()
    outs = []
    for inputs, layout, pairs in loader:
        inputs = {name: value.to(device) for name, value in inputs.items()}
        layout, pairs = layout.to(device), pairs.to(device)
        with torch.no_grad():
            ref = step_logps(reference(**inputs, use_cache=False).logits, layout).sums
        out = step_pref_loss(model(**inputs, use_cache=False).logits, layout, pairs, ref=ref, beta=0.5)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        outs.append(out)
    names = {"loss": [out.loss for out in outs], "margin": [out.metrics["rewards/margins"] for out in outs],
             "ranked right": [out.metrics["rewards/accuracies"] for out in outs]}  # fmt: skip
    rows.append({"epoch": epoch + 1, **{name: torch.stack(v).mean().item() for name, v in names.items()}})
print(table(rows))
