# SPDX-License-Identifier: Apache-2.0
"""Eight losses on the same pairs: what each does to right answers, length and likelihoods.

The pairs are the start model's own completions, a right one against a wrong one. Every loss starts from that model.

Shows: by how much the log-prob of chosen and rejected responses changes per token (DPO pushes rejected ones down, and
    the losses with a likelihood term hold the chosen ones up), and accuracy and length on other problems. One seed and
    one learning rate for all of them: this ranks nothing.

System: SimPO
Paper: arXiv 2405.14734
Changes: the reward is a token mean without a reference, and the margin has a target

System: LD-DPO
Paper: arXiv 2409.06411
Changes: tokens beyond the length that both responses have count less

System: TGDPO
Paper: arXiv 2506.14574
Changes: each token is weighted by the log-ratio of a model that DPO has trained before
Ours: that model is the first row's

System: 3D-properties
Paper: arXiv 2406.07327
Changes: a smaller beta for the rejected response (Flex-DPO), and likelihood terms for both
Ours: the weights of the terms

System: ASFT
Paper: arXiv 2409.10571
Changes: each response by itself, as a class of right or wrong, without a reference

System: SmPO (text analogue)
Paper: arXiv 2506.02698
Changes: (2 alpha - gamma) beta in place of beta, so that pairs of similar reward count little
Ours: text in place of images and no inversion; gamma = 1, and alpha from a reward of rightness and shortness
"""

import copy

import torch

from sspo_ext import step_logps, step_pref_loss
from sspo_ext.demo.play import Task, features, load_start, sampled_pairs, score, sized, table, train
from sspo_ext.losses import ld_dpo_weights, tgdpo_weights

task = Task("sums")
start, tokenizer = load_start()
problems = task.problems(sized(128, 24), seed=1, held_out=False)
held_out = task.problems(sized(100, 10), seed=2, held_out=True)
rows = features(sampled_pairs(start, tokenizer, task, problems), tokenizer, pair_by="sequence")


def pair_loss(loss_type="sigmoid", weights=None, **options):
    """A pair formula of the table of losses; `weights` makes token weights of the batch."""

    def loss(logits, ref_logits, batch):
        layout = batch["layout"]
        layout = layout if weights is None else layout.with_row_weights(weights(batch, ref_logits))
        ref = None if loss_type in ("simpo", "asft") else step_logps(ref_logits, layout)
        return step_pref_loss(logits, layout, batch["pairs"], ref=ref, loss_type=loss_type, **options).loss

    return loss


def beyond_common_length(batch, _):
    labels = torch.full_like(batch["input_ids"], -100)
    labels.flatten()[batch["layout"].places] = 1
    return ld_dpo_weights(labels, ld_alpha=0.3)


def guided(batch, ref_logits):
    layout, guide = batch["layout"], torch.zeros(batch["input_ids"].shape)
    with torch.no_grad():
        trained = step_logps(models["DPO"](**batch["inputs"]).logits, layout).tokens
    guide.flatten()[layout.places] = trained - step_logps(ref_logits, layout).tokens
    chosen = torch.arange(len(guide)) < len(guide) // 2
    return tgdpo_weights(guide, chosen, beta=0.5, tgdpo_alpha=0.5)


def smpo(logits, ref_logits, batch):
    layout, (w, r) = batch["layout"], batch["pairs"].index.long().unbind(1)
    u = step_logps(logits, layout).sums - step_logps(ref_logits, layout).sums
    better = 1 + (layout.counts[r] - layout.counts[w]) / 50  # right, and as many tokens shorter
    scale = 2 * torch.sigmoid(better) - 1
    return -torch.nn.functional.logsigmoid(scale * 0.5 * (u[w] - u[r])).mean()


losses = {
    "DPO": pair_loss(beta=0.5),
    "SimPO": pair_loss("simpo", beta=2.0, simpo_gamma=0.5),
    "LD-DPO": pair_loss(weights=beyond_common_length, beta=0.5),
    "TGDPO": pair_loss(weights=guided, beta=0.5),
    "3D-properties": pair_loss(
        ["flex_dpo", "nll", "nll_rejected"], loss_weights=[1, 0.5, 0.05], beta=0.5, beta_rejected=0.25
    ),
    "ASFT": pair_loss("asft", beta=0.1),
    "SmPO": smpo,
}
models, found = {}, [{"loss": "start", "chosen": 0.0, "rejected": 0.0, **score(start, tokenizer, task, held_out)}]
for name, of_logits in losses.items():
    model = models[name] = copy.deepcopy(start)
    last = {}

    def loss(batch, model=model, of_logits=of_logits, last=last):
        with torch.no_grad():
            ref_logits = start(**batch["inputs"]).logits
        logits = model(**batch["inputs"]).logits
        with torch.no_grad():
            change = step_logps(logits, batch["layout"]).means - step_logps(ref_logits, batch["layout"]).means
        last["chosen"], last["rejected"] = (side.mean().item() for side in change.chunk(2))
        return of_logits(logits, ref_logits, batch)

    train(model, rows, loss, updates=sized(40, 2))
    found.append({"loss": name, **last, **score(model, tokenizer, task, held_out)})
print(table(found))
