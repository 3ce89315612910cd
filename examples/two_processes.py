# SPDX-License-Identifier: Apache-2.0
"""Two processes make the update of one, though their shards have different numbers of pairs.

Two things: `num_items` is the number of pairs of all processes, and the loss is multiplied by the number of processes,
since DDP averages gradients. On GPUs start it by torchrun and take "nccl".

Shows: pairs and loss of either process, their sum beside one process with the whole batch, and how far the weights of
    the two ways are apart after an update.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sspo_ext import step_logps, step_pref_loss
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.demo.play import Task, features, load_start, table

task = Task("sums")
WORLD = 2


def batch_of(rank, tokenizer):
    """Three pairs of solutions for the first process, five for the second; a line is a step."""
    problems = task.problems(8, seed=1, held_out=False)
    problems = problems[:3] if rank == 0 else problems[3:] if rank == 1 else problems
    right = [task.minimal(p) for p in problems]
    rows = [
        {"prompt": p.prompt, "chosen": lines, "rejected": [line + " + 1" for line in lines]}
        for p, lines in zip(problems, right, strict=True)
    ]
    return StepPreferenceCollator(0)(features(rows, tokenizer))


def update(model, reference, batch, num_items, factor):
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        ref = step_logps(reference(**inputs).logits, batch["layout"]).sums + 1
    out = step_pref_loss(model(**inputs).logits, batch["layout"], batch["pairs"], ref=ref, num_items=num_items)
    (out.loss * factor).backward()
    optimizer.step()
    return out.loss.item()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    (model, tokenizer), (reference, _) = load_start(), load_start()
    batch = batch_of(rank, tokenizer)
    num_items = torch.tensor(float(batch["pairs"].num_valid))
    dist.all_reduce(num_items)
    loss = update(DistributedDataParallel(model), reference, batch, num_items, factor=WORLD)
    torch.save((batch["pairs"].num_valid, loss, model.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
        saved = [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]
    (alone, tokenizer), (reference, _) = load_start(), load_start()
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    batch = batch_of(None, tokenizer)
    loss = update(alone, reference, batch, None, factor=1)
    apart = max((saved[0][2][n] - value).abs().max().item() for n, value in alone.state_dict().items())
    moved = max((before[n] - value).abs().max().item() for n, value in alone.state_dict().items())
    rows = [{"": f"process {k}", "pairs": pairs, "loss": loss} for k, (pairs, loss, _) in enumerate(saved)]
    rows.append({"": "both", "pairs": sum(s[0] for s in saved), "loss": sum(s[1] for s in saved)})
    rows.append({"": "one process", "pairs": batch["pairs"].num_valid, "loss": loss})
    print(table(rows))
    print(f"\nweights moved by up to {moved:.1e}; the two ways are {apart:.1e} apart")
    assert apart < 1e-3 * moved
