"""The 4-D attention masks of packed branches, in the form that a model takes."""

from __future__ import annotations


from torch import Tensor
from torch import nn
from typing import Any
import torch
from ...hf.wrappers import unwrap
from .model import model_dtype
from .support import _BOOL_MASK, _FULL, _SLIDING

def four_d_mask(model: nn.Module, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The attention_mask argument for a (B, T, T) bool mask and (B, T) positions, in the form this model reads.

    A mask of our own replaces the model's sliding window too, so the window, counted in positions, is put into it.
    """
    config = _config(model)
    window = _window(config)
    kinds = getattr(config, "layer_types", None)

    def form(mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if _attention(config) in _BOOL_MASK:
            return mask
        dtype = model_dtype(model)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    if window is None:
        return form(seen)
    near = seen & (positions[:, :, None] - positions[:, None, :] < window)
    return form(near) if kinds is None else {_FULL: form(seen), _SLIDING: form(near)}

def _config(model: nn.Module) -> Any:
    config = getattr(unwrap(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

def _attention(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)

def _window(config: Any) -> int | None:
    if set(getattr(config, "layer_types", None) or ()) == {_FULL}:
        return None
    found = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return next((w for w in found if isinstance(w, int) and w > 0), None)

def _is_beyond(config: Any, longest: int) -> bool:
    window = _window(config)
    return window is not None and longest > window
