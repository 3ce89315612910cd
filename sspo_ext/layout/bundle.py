"""The base of layouts and pairs: a frozen bundle of tensors that moves between devices as one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TensorBundle:
    """Moves its tensor fields together; `host_...` fields stay on the host, where plans are made."""

    def _map(self, fn):
        mine = [f.name for f in fields(self) if not f.name.startswith("host_")]
        return replace(self, **{name: fn(v) for name in mine if isinstance(v := getattr(self, name), Tensor)})

    def to(self, device: torch.device | str):
        """The same object with its tensors on `device`. Never waits, except for copies to the host."""
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self, device=None):
        """Called by DataLoader(pin_memory=True)."""
        return self._map(lambda t: t.pin_memory())


class Steps(TensorBundle):
    """What pairs need to know of a layout: its steps, on the host, and its device."""

    host_step_offsets: Tensor  # (S + 1,) int64

    @property
    def num_steps(self) -> int:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError


def constant(values: Tensor) -> Tensor:
    """Detached, in float32, or in float64 if it came so."""
    return values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)
