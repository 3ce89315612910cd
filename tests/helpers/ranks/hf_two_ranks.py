# SPDX-License-Identifier: Apache-2.0
"""Run by test_hf.py under torchrun: each rank has its half of a batch; gradients must be those of the whole batch.

Loss: the sum over a rank's tokens, so that the mean over ranks (DDP, FSDP2) is half of the whole batch's gradient.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: E402

from benchmarks.models import families  # noqa: E402
from helpers.ranks import leave  # noqa: E402
from sspo_ext.hf.check import check_head  # noqa: E402
from sspo_ext.hf.forward import forward_hidden  # noqa: E402
from sspo_ext.hf.head import model_head  # noqa: E402
from sspo_ext.hf.whole_head import with_head  # noqa: E402
from sspo_ext.hf.wrappers import UnsupportedHead  # noqa: E402
from sspo_ext.losses.pref import linear_step_pref_loss  # noqa: E402


def shard(model, head_apart: bool, reshard: bool | None):
    for layer in model.model.layers:
        fully_shard(layer)
    if head_apart:  # accelerate's layout
        fully_shard(model.model.embed_tokens)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=reshard)


def whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def worst(model, expected: dict, factor: float) -> float:
    """Largest error of a gradient, relative to the parameter's largest."""
    found = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max((found[n] * factor - g).abs().max().item() / g.abs().max().item() for n, g in expected.items())


def data_parallel(rank: int, tied: bool) -> None:
    name = "llama-tied" if tied else "llama"
    ids = families.batch()[0]
    mine = ids[rank::2]
    truth = families.build(name)
    truth(input_ids=ids, use_cache=False).logits.square().sum().backward()
    expected = {n: p.grad for n, p in truth.named_parameters()}
    ways = {
        "DDP": lambda m: DDP(m),
        "DDP, unused": lambda m: DDP(m, find_unused_parameters=True),
        "FSDP2": lambda m: shard(m, False, None),
        "FSDP2, accelerate's layout": lambda m: shard(m, not tied, False),
        "FSDP2, resharded": lambda m: shard(m, False, True),
    }
    for way, wrap in ways.items():
        model = wrap(families.build(name))
        resharded = way == "FSDP2, resharded"
        if resharded:
            for refused in (
                lambda: check_head(model, {"input_ids": mine}),  # noqa: B023
                lambda: with_head(model, forward_hidden(model, input_ids=mine)[0], lambda h, head: head),  # noqa: B023
            ):
                try:
                    refused()
                    raise AssertionError("a sharded weight passed")
                except UnsupportedHead as error:
                    assert "sharded by FSDP2" in str(error), error
        else:
            check_head(model, {"input_ids": mine})
        for _ in range(2):
            model.zero_grad()
            hidden, _ = forward_hidden(model, input_ids=mine)
            if resharded:
                model.unshard()
            with_head(model, hidden, lambda hidden, head: head.logits(hidden).square().sum()).backward()
            error = worst(model, expected, 2.0)
            assert error < 2e-6, f"{way}, tied={tied}: {error}"
    try:
        forward_hidden(DDP(families.build(name), static_graph=True), input_ids=mine)
        raise AssertionError("static_graph passed")
    except UnsupportedHead as error:
        assert "static_graph" in str(error)


def tensor_parallel(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    options = families.FAMILIES["llama"][2] | dict(vocab_size=98)
    model = families.enlarge(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))).eval()
    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    split = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    ids, layout = families.batch()
    loss, expected = families.gradients(model, families.logits_route, ids, layout)
    check_head(split, {"input_ids": ids})
    hidden, _ = forward_hidden(split, input_ids=ids)
    head = model_head(split)
    assert hasattr(head.weight, "placements")
    found = linear_step_pref_loss(hidden, head.weight, layout, beta=1.0, **head.options).loss
    torch.testing.assert_close(found.detach(), loss)
    found.backward()
    error = worst(split, expected, 1.0)
    assert error < 2e-5, f"tensor parallel: {error}"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for tied in (True, False):
        data_parallel(rank, tied)
    tensor_parallel(rank, Path(sys.argv[1]))
    if rank == 0:
        print("all right")
    leave()


if __name__ == "__main__":
    main()
