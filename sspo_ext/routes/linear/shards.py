# SPDX-License-Identifier: Apache-2.0
"""A vocabulary split over ranks: local labels, and log-sum-exp and further reductions over the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..._checks import check_kind


class VocabShard:
    """Rows [start, start + size) of the head's `vocab` rows are on this rank of the named process group."""

    def __init__(self, group_name: str, start: int, size: int, vocab: int):
        self.group = resolve_group(group_name)
        self.start, self.size, self.vocab = start, size, vocab

    def local_labels(self, labels: Tensor) -> Tensor:
        """Labels within this shard, -1 for those of other shards.

        A label outside the whole vocabulary becomes `size` on every rank. The kernels give NaN for it, which `combine`
        keeps: no rank has to read a value, and -1 would be taken for a label of another rank.
        """
        local = labels - self.start
        local = torch.where((local >= 0) & (local < self.size), local, -1)
        return torch.where((labels >= 0) & (labels < self.vocab), local, self.size)

    def combine(self, logps: Tensor, lse: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and log-sum-exp over the whole vocabulary, from those over the shards.

        In a shard, logp is -lse for a label of -1. One all-gather of two floats a row; every rank then adds up in the
        same order, so all ranks hold the same bits.
        """
        lses, label_logits = self._gather(lse, _label_logit(logps, lse, local))
        total = torch.logsumexp(lses, dim=0)
        return (label_logits.sum(0) - total).to(logps.dtype), total

    def combine_reductions(
        self, logps: Tensor, lse: Tensor, entropy: Tensor, sum_p2: Tensor, kl: Tensor, ref_lse: Tensor, local: Tensor
    ) -> tuple[Tensor, ...]:
        """The results of `row_reductions_fwd` over the whole vocabulary, from those over the shards.

        One all-gather, as in `combine`; what is empty stays empty. With w = exp(lse of a shard - lse), the shard's
        probability, and q the same of the reference: H = sum w (H_shard - log w), sum p^2 = sum w^2 s_shard, and
        KL = sum q (KL_shard + log q - log w).
        """
        lses, label_logits, entropies, squares, kls, ref_lses = self._gather(
            lse, _label_logit(logps, lse, local), entropy, sum_p2, kl, ref_lse
        )
        total, ref_total = torch.logsumexp(lses, dim=0), torch.logsumexp(ref_lses, dim=0)
        log_w, log_q = lses - total, ref_lses - ref_total
        w, q = log_w.exp(), log_q.exp()
        if len(entropy):
            entropy = _over_shards(w, w * (entropies - log_w), entropy.dtype)
        if len(sum_p2):
            sum_p2 = _over_shards(w, w.square() * squares, sum_p2.dtype)
        if len(kl):
            allowed = torch.where(log_w == -torch.inf, torch.inf, q * (kls + log_q - log_w))
            kl = _over_shards(q, allowed, kl.dtype)
        return (label_logits.sum(0) - total).to(logps.dtype), total, entropy, sum_p2, kl, ref_total

    def _gather(self, *mine: Tensor) -> tuple[Tensor, ...]:
        """Values (n,) of this rank -> (ranks, n) float64 of all, in one collective."""
        packed = torch.cat([value.double() for value in mine])
        everyone = packed.new_empty((dist.get_world_size(self.group), len(packed)))
        dist.all_gather_into_tensor(everyone.view(-1), packed, group=self.group)
        return everyone.split([len(value) for value in mine], dim=1)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(partial, group=self.group)
        return partial


def _label_logit(logps: Tensor, lse: Tensor, local: Tensor) -> Tensor:
    """(N,) float64: the label's logit, 0 for a label of another shard, NaN for one outside the vocabulary."""
    return torch.where(local >= 0, logps.double() + lse, 0.0)


def _over_shards(weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """(ranks, N) -> (N,): the sum over ranks, except where a shard has no probability.

    A sum that rounding has made negative becomes 0; NaN stays.
    """
    return torch.where(weights == 0, 0.0, values).sum(0).clamp(min=0).to(dtype)


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    # torch has no public function for it
    resolve = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    return resolve(cast(Any, name))


@dataclass(frozen=True)
class ShardInfo:
    """Where a rank's rows of the head are in the vocabulary."""

    group_name: str  # "" when the whole vocabulary is here
    start: int
    largest: int  # rows of the largest shard
    vocab: int


def shard_of(weight: Tensor, tp_group) -> ShardInfo:
    """Where this rank's rows are: a DTensor knows, else the ranks' shards are equal and in order."""
    if hasattr(weight, "device_mesh"):
        return _shard_of_dtensor(weight, tp_group)
    size = weight.shape[0]
    if tp_group is None:
        return ShardInfo("", 0, size, size)
    check_kind("tp_group", tp_group, dist.ProcessGroup, "a process group of torch.distributed")
    world = dist.get_world_size(tp_group)
    return ShardInfo(tp_group.group_name, dist.get_rank(tp_group) * size, size, world * size)


def _shard_of_dtensor(weight, tp_group) -> ShardInfo:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not isinstance(placements[0], Shard) or placements[0].dim != 0:
        raise ValueError(f"weight: expected a DTensor sharded over its rows on a 1-D mesh, got {placements} on {mesh}")
    group = mesh.get_group()
    if tp_group is None or tp_group.group_name != group.group_name:
        raise ValueError(
            "tp_group: expected the group of the weight's mesh (weight.device_mesh.get_group()) beside a DTensor "
            "weight; if FSDP sharded it over data-parallel ranks, pass weight.full_tensor() or call the loss in forward"
        )
    world, vocab = mesh.size(), weight.shape[0]
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    return ShardInfo(group.group_name, offset[0], -(-vocab // world), vocab)


def local_part(tensor: Tensor) -> Tensor:
    """The tensor, or the part of a DTensor on this rank (differentiable)."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "device_mesh") else tensor
