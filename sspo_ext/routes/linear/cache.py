# SPDX-License-Identifier: Apache-2.0
"""Plans and their tables on the device, kept as long as the layout that they were made for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from .plan import LinearPlan

# host tensor of the layout -> {(versions, facts): (plan, the other tensor, which stays alive with it)}
_PLANS = WeakIdKeyDictionary()
_MOST_PLANS = 8  # of one layout


def cached_plan(make: Callable[[], LinearPlan], offsets: Tensor, other: Tensor | None, *facts: Hashable) -> LinearPlan:
    """What `make` gives for two host tensors and further facts. The second time it is not called.

    A tensor that was written to in place is another tensor.
    """
    tensors = [offsets] if other is None else [offsets, other]
    if any(t.is_inference() for t in tensors):  # their writes are not counted
        return make()
    plans = _PLANS.setdefault(offsets, {})
    key = (id(other), *(t._version for t in tensors), *facts)
    if key not in plans:
        if len(plans) >= _MOST_PLANS:
            del plans[next(iter(plans))]
        plans[key] = (make(), other)
    return plans[key][0]


def kept_on_device(plan: LinearPlan, name: str, device: torch.device, make: Callable[[], object]):
    """What `make` gives, kept with the plan: for this device, and on a GPU for the current stream.

    What is made while a CUDA graph is captured belongs to the graph and is not kept.
    """
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (name, device, stream)
    if key not in plan.on_device:
        plan.on_device[key] = make()
    return plan.on_device[key]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
