"""A vocabulary split over 2 and 4 gloo processes against one process: loss, log-probs and every gradient,
Megatron's layout and DTensor.

All cases run in one start of four processes, since importing torch is most of the time.

Mutations of sspo_ext/{tensor_parallel,linear_engine,linear_ops}.py, and the test that catches each:
* label looked for on the wrong shard: test_equals_one_process
* log-sum-exp of one shard: test_equals_one_process
* hidden gradient not reduced: test_equals_one_process
* a shard without rows adds NaN as its label's logit: test_equals_one_process[dtensor, 4, a shard without rows]
* chunks cut by a rank's own rows (ranks then wait for each other): test_equals_one_process
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_linear import assert_fp64_rule
from helpers_tensor_parallel import CASES, call, inputs, worker

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """results[rank][case]"""
    folder = str(tmp_path_factory.mktemp("ranks"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(4, folder), nprocs=4, start_method="spawn")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(4)]


def one_process(case, dtype, backend):
    """[loss, agreed, gradients] with the whole vocabulary here."""
    layout, pairs, p = inputs(case)
    leaves = p.leaves(case.needs, dtype)
    loss, agreed = call(case, leaves, layout, pairs, backend=backend)
    if loss.requires_grad:
        (loss * case.upstream).backward()
    return dict(
        zip(
            ("loss", "agreed", "hidden", "weight", "bias"),
            (loss.detach(), agreed, *(t.grad for t in leaves)),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    case = CASES[name]
    got = [ranks[r][name] for r in range(case.world)]
    assert all(isinstance(g, dict) for g in got), got
    same, truth = one_process(case, case.dtype, "reference"), one_process(case, torch.float64, "reference")
    for key in ("loss", "agreed", "hidden"):
        assert all(g[key] is None or torch.equal(g[key], got[0][key]) for g in got), f"{key}: ranks differ"
    for key, wanted in (("loss", 1), ("agreed", 1), *zip(("hidden", "weight", "bias"), case.needs, strict=True)):
        if not wanted:
            assert all(g[key] is None for g in got), key
            continue
        value = torch.cat([g[key] for g in got]) if key in ("weight", "bias") else got[0][key]
        if case.buffer and key == "weight":  # a sum with ones, rounded at 1
            torch.testing.assert_close(value, truth[key].to(value.dtype), rtol=1e-5, atol=3e-7)
        else:
            assert_fp64_rule(f"{name}: {key}", value, same[key], truth[key], case.dtype)


@pytest.mark.parametrize("world, V", [(2, 40), (4, 40), (2, 37), (4, 37)])
def test_labels_are_on_every_shard(world, V):
    """What the cases rest on."""
    case = next(c for c in CASES.values() if (c.world, c.V) == (world, V))
    labels = inputs(case)[0].labels
    assert len(torch.unique(labels // -(-V // world))) == world


def test_refusals(ranks):
    for rank in (0, 1):
        messages = ranks[rank]["refusals"]
        assert "weight" in messages["replicated"] and "weight" in messages["columns"], messages
        # an FSDP parameter looks the same: its ranks hold other rows, so the group must be said
        assert "tp_group" in messages["unsaid"], messages
        assert "tp_group" in messages["reference"], messages
