# SPDX-License-Identifier: Apache-2.0
"""The LM head outside the model's forward, where FSDP2 and ZeRO-3 may have taken its weight apart again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .head import LMHead, model_head
from .wrappers import find_head

Found = TypeVar("Found")


def with_head(model: nn.Module, hidden: Tensor, function: Callable[[Tensor, LMHead], Found]) -> Found:
    """Call `function(hidden, head)` where the head's weight is whole and its gradient goes where the optimizer looks.

    For most models this is `function(hidden, model_head(model))`. FSDP2 gathers the weight first, if the forward has
    resharded it. ZeRO-3 has a whole weight only inside a call of the module that owns it, so that module is called once
    more, with `function` as its forward: DeepSpeed's own hooks gather the weight and reduce its gradient.

    All processes of FSDP2 and ZeRO-3 have to make the call.

    Args:
        model: the outermost module, as for `forward_hidden`, whose forward this follows.
        hidden: (B, T, H) of `forward_hidden`.
        function: a loss. It returns a dataclass, a tensor, or something without a gradient.

    Returns:
        What the function returns. Under ZeRO-3 its tensors with a gradient have passed DeepSpeed's hooks: those of a
        dataclass are replaced.

    Raises:
        UnsupportedHead: as `model_head`.

    Examples:
        >>> hidden, _ = forward_hidden(model, input_ids=input_ids)
        >>> with_head(model, hidden, lambda hidden, head: head.logits(hidden)).shape == (*hidden.shape[:2], 256)
        True
    """
    _, head = find_head(model)
    weight = getattr(head, "weight", None)
    if hasattr(weight, "ds_id"):
        owner = next(part for part in head.modules() if any(p is weight for p in part.parameters(recurse=False)))
        return _as_forward(owner, model, hidden, function)
    unit = head_unit(model, head)
    if unit is None or not hasattr(weight, "placements"):
        return function(hidden, model_head(model))
    unit.unshard()
    try:
        return function(hidden, model_head(model))
    finally:
        if not torch.is_grad_enabled():  # else backward needs it, and reshards it
            unit.reshard()


def head_unit(model: nn.Module, head: nn.Module) -> Any:
    """Return the module that FSDP2 shards as one unit with the head's weight; None without FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    around = [m for m in model.modules() if isinstance(m, FSDPModule) and any(part is head for part in m.modules())]
    return around[-1] if around else None  # the last one is the innermost


def _as_forward(owner: nn.Module, model: nn.Module, hidden: Tensor, function: Callable[[Tensor, LMHead], Any]) -> Any:
    """Call `owner`, hooks and all, with the function in place of its forward."""
    found: Any = None
    names: list[str] = []

    def forward(hidden: Tensor) -> Any:
        nonlocal found
        found = function(hidden, model_head(model))
        if isinstance(found, Tensor):
            return found
        values = {f.name: getattr(found, f.name) for f in fields(found)} if is_dataclass(found) else {}
        with_grad = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
        names.extend(with_grad)
        return tuple(with_grad.values())

    own = vars(owner).get("forward")
    owner.forward = forward
    try:
        passed = owner(hidden)
    finally:
        del owner.forward
        if own is not None:
            owner.forward = own
    if isinstance(found, Tensor):
        return passed
    return replace(found, **dict(zip(names, passed, strict=True))) if names else found
