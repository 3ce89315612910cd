# SPDX-License-Identifier: Apache-2.0
"""The base of layouts and pairs: a frozen bundle of tensors that moves between devices as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .._checks import describe

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class TensorBundle:
    """A dataclass whose tensors move together. Fields named `host_...` stay on the host, where plans are made."""

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        mine = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("host_")}
        moved = {name: fn(v) for name, v in mine.items() if isinstance(v, Tensor)}
        inner = {name: v._map(fn) for name, v in mine.items() if isinstance(v, TensorBundle)}
        return replace(self, **moved, **inner)

    def to(self, device: torch.device | str) -> Self:
        """The same object with its tensors on `device`.

        Only a copy to the host waits for the device.
        """
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self, device=None) -> Self:
        """The same object with its tensors in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return self._map(lambda t: t.pin_memory())


class Built:
    """A dataclass that only its `from_...` methods make: it refuses values by position, which are meant for them."""

    def __new__(cls, *values, **fields_):
        """Raises TypeError for values by position; torch.compile of torch 2.6 gives all of them so."""
        if values and len(values) < len(fields(cast(Any, cls))):
            ways = " or ".join(f"{cls.__name__}.{name}(...)" for name in dir(cls) if name.startswith("from_"))
            raise TypeError(f"{cls.__name__}: expected a call of {ways}, got {describe(values[0])} by position")
        return super().__new__(cls)


class Steps(Built, TensorBundle):
    """What pairs need to know of a layout: its steps, on the host, and its device."""

    host_step_offsets: Tensor  # (S + 1,) int64

    @property
    def num_steps(self) -> int:
        """S."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        raise NotImplementedError


def constant(values: Tensor) -> Tensor:
    """The values detached, in float64 if they came so, else in float32."""
    return values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)
