# SPDX-License-Identifier: Apache-2.0
"""Losses of rows that two processes share, run by test_parts.py under torchrun: those of whole rows on one process."""

import json
import sys

import torch
import torch.distributed as dist

from sspo_ext import (
    LayoutPart,
    StepLayout,
    gather_logps,
    linear_step_logps,
    linear_step_policy_loss,
    linear_step_pref_loss,
    policy_loss,
    pref_loss,
    step_logps,
    step_policy_loss,
    step_pref_loss,
)

LENGTH, WIDTH, VOCAB = 22, 8, 50
CUTS = {
    "halves": [range(11), range(11, 22)],
    "head and tail": [[*range(5), *range(17, 22)], range(5, 17)],
    "all on one": [range(22), range(0)],
}
PREF = {
    "sigmoid": {"beta": 0.5}, "simpo": {"reference_free": True, "simpo_gamma": 0.3},
    "ipo": {"beta": 0.5},
}  # fmt: skip
POLICY = {
    "token": {"loss_type": "ppo"}, "step": {"loss_type": "ppo", "importance_sampling_level": "step"},
    "sequence": {"loss_type": "ppo", "importance_sampling_level": "sequence", "kl_coef": 0.1},
    "entropy": {"entropy_coef": 0.01, "aggregation": "sequence"},
}  # fmt: skip


def batch():
    """Hidden states, the head's weight, a layout of four sequences with steps across every cut, and references."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, LENGTH, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g)
    labels = torch.randint(VOCAB, (4, LENGTH), generator=g)
    step_ids = (torch.arange(LENGTH) // 3 - 1).expand(4, -1).clone()
    step_ids[1, 15:] = -1
    layout = StepLayout.from_step_ids(labels, step_ids, token_weights=torch.rand(4, LENGTH, generator=g) + 0.5)
    noise = 0.3 * torch.randn(layout.num_rows, generator=g)
    advantages = torch.randn(layout.num_steps, generator=g)
    return hidden, weight, layout, noise, advantages


def whole_loss(hidden, weight, layout, route, kind, advantages, options):
    inputs = (hidden, weight) if route == "linear" else (hidden @ weight.T,)
    if kind == "pref":
        loss = linear_step_pref_loss if route == "linear" else step_pref_loss
        return loss(*inputs, layout, layout.pair_by_index(), **options).loss
    loss = linear_step_policy_loss if route == "linear" else step_policy_loss
    return loss(*inputs, layout, advantages, **options).loss


def cut_loss(hidden, weight, part, route, kind, advantages, options):
    entropy = {"entropy": True} if options.get("entropy_coef") else {}
    if route == "linear":
        mine = linear_step_logps(hidden, weight, part.layout, **entropy)
    else:
        mine = step_logps(hidden @ weight.T, part.layout, **entropy)
    logps = gather_logps(mine, part)
    if kind == "pref":
        return pref_loss(logps, part.whole, part.whole.pair_by_index(), **options).loss
    return policy_loss(logps, part.whole, advantages, **options).loss


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    hidden, weight, layout, noise, advantages = batch()
    old = step_logps(hidden @ weight.T, layout).tokens + noise
    found = {}
    for cut, positions in CUTS.items():
        mine = torch.as_tensor(list(positions[rank]), dtype=torch.int64)
        part = LayoutPart.from_positions(layout, mine)
        for kind, name, options in [
            *(("pref", n, {"loss_type": n, **o}) for n, o in PREF.items()),
            *(("policy", n, o) for n, o in POLICY.items()),
        ]:
            if kind == "pref" and not options.get("reference_free"):
                sums = torch.zeros(layout.num_steps).index_add(0, layout.step_of_row, old * layout.weights)
                options["ref"] = sums
            if options.get("loss_type") == "ppo":
                options["old"] = old
            if options.get("kl_coef"):
                options["ref"] = old
            for route in ("linear", "logits"):
                expected = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
                truth = whole_loss(*expected, layout, route, kind, advantages, options)
                truth.backward()
                leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
                loss = cut_loss(leaves[0][:, mine], leaves[1], part, route, kind, advantages, options)
                loss.backward()
                errors = [abs(loss.item() - truth.item()) / abs(truth.item())]
                for leaf, other in zip(leaves, expected, strict=True):
                    dist.all_reduce(leaf.grad)
                    errors.append(((leaf.grad - other.grad).abs().max() / other.grad.abs().max()).item())
                found[f"{cut}, {kind} {name}, {route}"] = errors
    problems = {}
    for name, positions in {"twice": range(12), "nobody": range(10)}.items():
        part = LayoutPart.from_positions(layout, CUTS["halves"][1] if rank else positions)
        logits = hidden[:, list(CUTS["halves"][1] if rank else positions)] @ weight.T
        try:
            gather_logps(step_logps(logits, part.layout), part)
            problems[name] = "nothing was said"
        except ValueError as error:
            problems[name] = str(error)
    if rank == 0:
        print(json.dumps({"errors": found, "problems": problems}))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
