"""The 4-D attention masks of packed branches, in the form that a model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...hf.wrappers import unwrap
from .model import model_dtype

FULL, SLIDING = "full_attention", "sliding_attention"

# A 4-D mask replaces what the model would build: these read a bool one (True: seen), those a float one that is added.
BOOL_MASK, FLOAT_MASK = ("sdpa",), ("eager",)


def four_d_mask(model: nn.Module, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The attention_mask argument for a (B, T, T) bool mask and (B, T) positions, in the form this model reads.

    A mask of our own replaces the model's sliding window too, so the window, counted in positions, is put into it.
    """
    config = config_of(model)
    window = window_of(config)
    kinds = getattr(config, "layer_types", None)

    def form(mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if attention_of(config) in BOOL_MASK:
            return mask
        dtype = model_dtype(model)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    if window is None:
        return form(seen)
    near = seen & (positions[:, :, None] - positions[:, None, :] < window)
    return form(near) if kinds is None else {FULL: form(seen), SLIDING: form(near)}


def config_of(model: nn.Module) -> Any:
    config = getattr(unwrap(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def attention_of(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)


def window_of(config: Any) -> int | None:
    if set(getattr(config, "layer_types", None) or ()) == {FULL}:
        return None
    found = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return next((w for w in found if isinstance(w, int) and w > 0), None)


def is_beyond(config: Any, longest: int) -> bool:
    window = window_of(config)
    return window is not None and longest > window
