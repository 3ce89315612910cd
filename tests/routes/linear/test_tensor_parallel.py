# SPDX-License-Identifier: Apache-2.0
"""A vocabulary split over 2 and 4 gloo processes against one process: loss, log-probs, entropy, sum of squares, KL and
every gradient, Megatron's layout and DTensor; and what the shards give put together in one process, for the edges.

All cases run in one start of four processes, since importing torch is most of the time.

Mutations of sspo_ext/{tensor_parallel,linear_engine,linear_ops}.py, and the test that catches each:
* label looked for on the wrong shard: test_equals_one_process
* log-sum-exp of one shard: test_equals_one_process
* hidden gradient not reduced: test_equals_one_process
* a shard without rows adds NaN as its label's logit: test_equals_one_process[dtensor, 4, a shard without rows]
* chunks cut by a rank's own rows (ranks then wait for each other): test_equals_one_process
* entropy, sum_p2, KL of one shard; their backward with the shard's log-sum-exp, with labels of the whole vocabulary, or
  not reduced: test_equals_one_process[reductions]
* H without -log w, w for w^2, the policy's w in KL, KL without log q, a shard without probability counts, KL finite
  where the policy forbids what the reference allows: test_shards_put_together
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.linear import assert_linear_rule
from helpers.ranks.tensor_parallel import CASES, call, inputs, worker

from sspo_ext import backends
from sspo_ext.backends import reference
from sspo_ext.routes.linear.shards import VocabShard

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
        elif case.dtype == torch.float64:  # the truth's own rounding is as large
            size = truth[key].abs().max()
            assert (value - truth[key]).abs().max() <= 64 * torch.finfo(torch.float64).eps * size, key
        else:
            assert_linear_rule(f"{name}: {key}", value, same[key], truth[key], case.dtype)


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


def combined(logits, ref, labels, sizes):
    """What ranks with shards of these sizes would all hold, each shard's values by the specification in float64."""
    bounds, rows = torch.tensor([0, *sizes]).cumsum(0).tolist(), torch.arange(len(labels))
    parts, locals_ = [], []
    for start, end in zip(bounds, bounds[1:], strict=False):
        x, y = logits[:, start:end], ref[:, start:end]
        local = torch.where((labels >= start) & (labels < end), labels - start, -1)
        values = [torch.full((len(labels),), math.nan).double()] * 4
        if end > start:
            values = [x.log_softmax(-1).gather(-1, local.clamp(min=0)[:, None])[:, 0]]
            values += reference.row_reductions(x[None], rows, y[None], 1.0, 0.0)
        parts.append((values[0], x.logsumexp(-1), *values[1:], y.logsumexp(-1)))
        locals_.append(local)
    shard = VocabShard.__new__(VocabShard)
    asked = []
    shard._gather = lambda *mine: asked.append(mine) or torch.zeros(len(mine), len(sizes), len(labels)).double()
    for part, local in zip(parts, locals_, strict=True):
        shard.combine_reductions(*part, local)
    everyone = [torch.stack(values) for values in zip(*asked, strict=True)]
    shard._gather = lambda *mine: everyone
    return shard.combine_reductions(*parts[0], locals_[0])


@pytest.mark.parametrize("sizes", [(37,), (10, 10, 17), (0, 12, 0, 25), (1,) * 37], ids=str)
def test_shards_put_together(sizes):
    """Rows as they come, with forbidden tokens, whole shards of them, and of the policy alone: then KL is infinite."""
    g = torch.Generator().manual_seed(3)
    logits, ref = (torch.randn(6, 37, generator=g, dtype=torch.float64) * 4 for _ in "ab")
    labels = torch.tensor([0, 9, 10, 36, 20, 11])
    for x in (logits, ref):
        x[1, 10:] = -math.inf
        x[2, :10], x[2, 12:] = -math.inf, -math.inf
    ref[3, 5:20] = -math.inf
    logits[4, :12] = -math.inf
    logits[5, 30] = math.nan
    got = combined(logits, ref, labels, sizes)
    expected = (
        logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0], logits.logsumexp(-1),
        *reference.row_reductions(logits[None], torch.arange(6), ref[None], 1.0, 0.0), ref.logsumexp(-1),
    )  # fmt: skip
    assert expected[4][4] == math.inf and all(value[5].isnan() for value in expected[:5])
    for name, value, exact in zip(("logp", "lse", "entropy", "sum_p2", "kl", "ref_lse"), got, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m, n=name: n + m)


def test_what_was_not_asked_for_stays_empty():
    shard, none = VocabShard.__new__(VocabShard), torch.empty(0)
    lse = torch.tensor([2.0, -1.0], dtype=torch.float64)
    shard._gather = lambda *mine: [value.double().expand(2, -1) for value in mine]
    local = torch.tensor([0, -1])
    _, total, entropy, sum_p2, kl, ref_lse = shard.combine_reductions(
        torch.tensor([-1.0, -1.0]), lse, torch.tensor([0.5, 0.25]), none, none, none.double(), local
    )
    # two equal shards: a factor of 2 to every probability's inverse
    torch.testing.assert_close(total, lse + math.log(2))
    torch.testing.assert_close(entropy, torch.tensor([0.5, 0.25]) + math.log(2))
    assert len(sum_p2) == len(kl) == len(ref_lse) == 0


@pytest.mark.parametrize("sizes", [(37,), (10, 10, 17), (0, 12, 0, 25)], ids=str)
def test_a_label_outside_the_vocabulary_is_nan_on_every_rank(sizes):
    """Under torch.compile no label is read on the host. The label of another rank, -1 there, is no error."""
    labels = torch.tensor([-1, 37, 5, 2**40, 36, -(2**40)])
    wrong = (labels < 0) | (labels >= 37)
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows, row_of, ones = torch.arange(6), torch.arange(6, dtype=torch.int32), torch.ones(6, dtype=torch.float64)
    parts, starts = logits.split(list(sizes), dim=1), [sum(sizes[:k]) for k in range(len(sizes))]
    shards = []
    for start, size in zip(starts, sizes, strict=True):
        shard = VocabShard.__new__(VocabShard)  # without a group
        shard.start, shard.size, shard.vocab = start, size, 37
        shards.append(shard)
    locals_ = [shard.local_labels(labels) for shard in shards]
    kernels = backends.load("cpu")
    found = [
        kernels.token_logp_fwd(part.contiguous()[None], rows, local, 1.0, 0.0)
        for part, local in zip(parts, locals_, strict=True)
    ]
    asked = []
    for shard, (logp, lse), local in zip(shards, found, locals_, strict=True):
        shard._gather = lambda *mine: asked.append(mine) or torch.zeros(2, len(sizes), 6).double()
        shard.combine(logp, lse, local)
    everyone = [torch.stack(values) for values in zip(*asked, strict=True)]
    for shard, part, (logp, lse), local in zip(shards, parts, found, locals_, strict=True):
        shard._gather = lambda *mine: everyone
        logp, lse = shard.combine(logp, lse, local)
        assert logp[wrong].isnan().all()
        expected = logits.log_softmax(-1)[~wrong].gather(1, labels[~wrong, None])[:, 0]
        torch.testing.assert_close(logp[~wrong], expected)
        if part.shape[1]:
            out = torch.empty_like(part.contiguous())[None]
            kernels.token_logp_bwd(part.contiguous()[None], row_of, local, lse, ones, None, 1.0, 0.0, out)
            assert out[0, wrong].isnan().all() and out[0, ~wrong].isfinite().all()
