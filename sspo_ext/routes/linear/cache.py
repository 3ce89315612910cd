# SPDX-License-Identifier: Apache-2.0
"""Plans and their tables on the device, kept as long as the layout that they were made for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...objective.values import copied

if TYPE_CHECKING:
    from .plan import LinearPlan

_Tables = TypeVar("_Tables")

# host tensor of the layout -> {contents and facts: plan}
_PLANS = WeakIdKeyDictionary()
_MOST_PLANS = 8  # of one layout


def cached_plan(make: Callable[[], LinearPlan], offsets: Tensor, other: Tensor | None, *facts: Hashable) -> LinearPlan:
    """What `make` gives for two host tensors and further facts. The second time it is not called.

    Tensors are compared by what they hold, so equal pairs share a plan, and a tensor that was written to is another.
    """
    plans: dict[tuple[Hashable, ...], LinearPlan] = _PLANS.setdefault(offsets, {})  # pyright: ignore[reportAssignmentType]
    key = (*(None if t is None else t.numpy().tobytes() for t in (offsets, other)), *facts)
    if key not in plans:
        if len(plans) >= _MOST_PLANS:
            del plans[next(iter(plans))]
        plans[key] = make()
    return plans[key]


def kept_on_device(plan: LinearPlan, name: str, device: torch.device, make: Callable[[], _Tables]) -> _Tables:
    """What `make` gives, kept with the plan: for this device, and on a GPU for the current stream.

    While a CUDA graph is captured nothing can be copied from the host: a replay would read memory that is gone.
    """
    if device.type != "cuda":
        stream = None
    elif torch.cuda.is_current_stream_capturing():
        for (kept, on, _), tables in plan.on_device.items():
            if (kept, on) == (name, device):
                return tables
        raise RuntimeError(
            "layout: run this call once before it is captured in a CUDA graph; its tables are copied from the host"
        )
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (name, device, stream)
    if key not in plan.on_device:
        plan.on_device[key] = make()
    return plan.on_device[key]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return copied(torch.from_numpy(array), device)
