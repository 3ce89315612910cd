# SPDX-License-Identifier: Apache-2.0
"""TARS for text: DPO on inputs whose least relevant tokens are perturbed for the worst, and a consistency term.

The prompt's tokens that move the loss least are perturbed: their embeddings go a step up the loss (max), and the model
learns on these inputs (min). A second term compares hidden states of both inputs in the frequency domain.

Shows: on held-out pairs with perturbed prompts TARS has about half of the loss that DPO has, and not more on the pairs
    as they are; hidden states move about as far.

System: TARS
Paper: arXiv 2507.21584
Changes: DPO's loss is minimised under the worst perturbation of some input tokens, with a spectral term
Ours: text alone: tokens of the prompt with the smallest gradients in place of visual-agnostic ones; one ascent step
    of fixed size; the distance of FFT magnitudes of the last hidden states over the response
"""

import copy

import torch

from sspo_ext import step_logps, step_pref_loss
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.demo.play import Task, features, load_start, sampled_pairs, sized, table, train

task = Task("sums")
start, tokenizer = load_start()
STEP, SHARE, WEIGHT = 0.5, 0.5, 0.05


def rows_of(problems):
    return features(sampled_pairs(start, tokenizer, task, problems, samples=6), tokenizer, pair_by="sequence")


rows = rows_of(task.problems(sized(120, 24), seed=1, held_out=False))
tests = rows_of(task.problems(sized(60, 24), seed=2, held_out=True))


def dpo_loss(model, batch, embedded, ref):
    outputs = model(
        inputs_embeds=embedded, attention_mask=batch["attention_mask"], use_cache=False, output_hidden_states=True
    )
    out = step_pref_loss(outputs.logits, batch["layout"], batch["pairs"], ref=ref, beta=0.5)
    return out.loss, outputs.hidden_states[-1]


def prompt_of(batch):
    """(B, T) bool: tokens before the response."""
    scored = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    scored.flatten()[batch["layout"].places] = True
    return (scored.cumsum(1) == 0) & batch["attention_mask"].bool()


def perturbed(model, batch, embedded, ref):
    """The embeddings, with the prompt tokens of the smallest gradients moved up the loss."""
    leaf = embedded.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(model, batch, leaf, ref)[0], leaf)
    size = gradient.norm(dim=-1).masked_fill(~prompt_of(batch), torch.inf)
    count = (prompt_of(batch).sum(1) * SHARE).long().clamp(min=1)
    chosen = size.argsort(1).argsort(1) < count[:, None]
    direction = torch.nn.functional.normalize(gradient, dim=-1)
    return embedded + STEP * embedded.detach().norm(dim=-1, keepdim=True) * direction * chosen[..., None]


def losses(model, batch):
    """DPO's loss, the loss of perturbed inputs, and the distance of hidden states in the frequency domain."""
    with torch.no_grad():
        ref = step_logps(start(**batch["inputs"]).logits, batch["layout"]).sums
    embedded = model.get_input_embeddings()(batch["input_ids"])
    plain, hidden = dpo_loss(model, batch, embedded, ref)
    worst, moved = dpo_loss(model, batch, perturbed(model, batch, embedded, ref), ref)
    response = (~prompt_of(batch) & batch["attention_mask"].bool())[..., None]
    a, b = (torch.fft.rfft(h * response, dim=1, norm="ortho").abs() for h in (hidden, moved))
    return plain, worst, (a - b).square().mean()


test = StepPreferenceCollator(0)(tests)
test["inputs"] = {"input_ids": test["input_ids"], "attention_mask": test["attention_mask"], "use_cache": False}
objectives = {
    "DPO": lambda plain, worst, distance: plain,
    "TARS": lambda plain, worst, distance: worst + WEIGHT * distance,
}
found = []
for name, objective in objectives.items():
    model = copy.deepcopy(start)
    train(model, rows, lambda b: objective(*losses(model, b)), updates=sized(30, 2))  # noqa: B023
    plain, worst, distance = losses(model, test)
    found.append({"": name, "loss": plain.item(), "loss, perturbed": worst.item(), "distance": distance.item()})
print(table(found))
