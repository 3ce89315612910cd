"""A vocabulary split over ranks: which label is whose, and the log-sum-exp over all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard:
    """Rows [start, start + size) of the head live on this rank of the named process group."""

    def __init__(self, group_name: str, start: int, size: int):
        self.group = resolve_group(group_name)
        self.start, self.size = start, size

    def local_labels(self, labels: Tensor) -> Tensor:
        """Labels within this shard, -1 (no label here) for those of other shards."""
        local = labels - self.start
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def combine(self, logps: Tensor, lse: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and log-sum-exp over the whole vocabulary from those over the shards (for a label of -1, logp is -lse).

        One all-gather of two floats a row; every rank then adds up in the same order, so all ranks hold the same bits.
        """
        label_logit = torch.where(local >= 0, logps.double() + lse, 0.0)
        mine = torch.stack([lse, label_logit])
        world = dist.get_world_size(self.group)
        everyone = mine.new_empty((world, *mine.shape))
        dist.all_gather_into_tensor(everyone.view(-1, *mine.shape[1:]), mine, group=self.group)
        total = torch.logsumexp(everyone[:, 0], dim=0)
        return (everyone[:, 1].sum(0) - total).to(logps.dtype), total

    def all_reduce(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial, group=self.group)
        return partial


def resolve_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def shard_of(weight: Tensor, tp_group) -> tuple[Tensor, str, int, int]:
    """(local weight, group name or "", first vocabulary row here, size of the whole vocabulary)."""
    if type(weight) is not Tensor and hasattr(weight, "device_mesh"):
        return _shard_of_dtensor(weight, tp_group)
    if tp_group is None:
        return weight, "", 0, weight.shape[0]
    world, size = dist.get_world_size(tp_group), weight.shape[0]
    return weight, tp_group.group_name, dist.get_rank(tp_group) * size, world * size


def _shard_of_dtensor(weight, tp_group) -> tuple[Tensor, str, int, int]:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    if tp_group is not None:
        raise ValueError("tp_group: expected None beside a DTensor weight, whose mesh names the group")
    if mesh.ndim != 1 or not isinstance(placements[0], Shard) or placements[0].dim != 0:
        raise ValueError(
            f"weight: expected a DTensor sharded over its rows on a 1-D mesh, got placements {placements} on {mesh}"
        )
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    return weight.to_local(), mesh.get_group().group_name, offset[0], weight.shape[0]
