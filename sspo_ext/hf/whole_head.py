# SPDX-License-Identifier: Apache-2.0
"""The LM head outside the model's forward, where ZeRO-3 has taken its weight apart again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from .head import LMHead, model_head
from .wrappers import find_head

Found = TypeVar("Found")


def with_head(model: nn.Module, hidden: Tensor, function: Callable[[Tensor, LMHead], Found]) -> Found:
    """Call `function(hidden, head)` where the head's weight is whole and its gradient goes where the optimizer looks.

    For most models this is `function(hidden, model_head(model))`. ZeRO-3 has a whole weight only inside a call of the
    module that owns it, so that module is called once more, with `function` as its forward: DeepSpeed's own hooks
    gather the weight and reduce its gradient. All its processes have to make the call.

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
        >>> with_head(model, hidden, lambda hidden, head: head.logits(hidden)).shape[:2]
        torch.Size([4, 16])
    """
    _, head = find_head(model)
    weight = getattr(head, "weight", None)
    if hasattr(weight, "ds_id"):
        owner = next(part for part in head.modules() if any(p is weight for p in part.parameters(recurse=False)))
        return _as_forward(owner, model, hidden, function)
    return function(hidden, model_head(model))


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
