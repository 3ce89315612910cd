"""What the autograd.Functions of the routes share."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18  # float32 temporaries of 1 MiB: near a core, and nothing beside the gradients


def refuse_double_backward() -> None:
    """Raises inside a backward that is itself being recorded. `once_differentiable` would not do: it refuses only a
    gradient that comes in with a graph, which that of a loss has not, and the result would then be taken for a
    constant, silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sspo_ext: create_graph=True asks for a second derivative, and step losses and log-probabilities have only "
            "a first; backend='reference' is differentiable as often as wanted"
        )


def scale_kept(kept: Tensor, scale: Tensor) -> Tensor:
    """scale * kept for a gradient (R, C) kept from forward and a scale () or (R, 1): the product in float32, rounded
    once.

    Over `kept` itself unless the graph is kept for another backward, so that no second copy of it exists. A row whose
    scale is 0 is zeros, whatever it held.
    """
    if torch.compiler.is_compiling():
        # the 0-dim scale alone would not widen the product
        product = kept.to(torch.promote_types(kept.dtype, scale.dtype)) * scale
        return torch.where(scale == 0, 0.0, product).to(kept.dtype)
    if scale.ndim == 0 and scale.device.type == "cpu" and scale.item() == 1:
        # a read of host memory, not a sync: the usual upstream gradient of 1 costs nothing
        return kept.clone() if _graph_is_kept() else kept
    out = torch.empty_like(kept) if _graph_is_kept() else kept
    block = max(1, _BLOCK_ELEMENTS // max(1, kept[:1].numel()))
    for start in range(0, kept.shape[0], block):
        rows = slice(start, start + block)
        factor = scale[rows] if scale.ndim else scale
        product = kept[rows].to(torch.promote_types(kept.dtype, scale.dtype)) * factor
        out[rows] = product.masked_fill_(factor == 0, 0.0)
    return out


def _graph_is_kept() -> bool:
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if known is None else known()
