# SPDX-License-Identifier: Apache-2.0
"""The 4-D attention masks of packed branches, in the form that a model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...hf.wrappers import text_config
from .model import model_dtype

FULL, SLIDING = "full_attention", "sliding_attention"

# A 4-D mask replaces the model's own. BOOL_MASK take a bool mask (True: seen); FLOAT_MASK take a float mask and add it.
BOOL_MASK, FLOAT_MASK = ("sdpa",), ("eager",)


def four_d_mask(model: nn.Module, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Make the model's `attention_mask` argument from a (B, T, T) bool mask and (B, T) positions.

    A 4-D mask replaces the model's sliding window too. So the window, counted in positions, becomes part of the mask.
    """
    config = text_config(model)
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


def attention_of(config: Any) -> str | None:
    """Return the name of the attention implementation: "sdpa", "eager", ..."""
    return getattr(config, "_attn_implementation", None)


def window_of(config: Any) -> int | None:
    """Return the sliding window in tokens; None for a model without one."""
    if set(getattr(config, "layer_types", None) or ()) == {FULL}:
        return None
    found = (getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return next((w for w in found if isinstance(w, int) and w > 0), None)


def is_beyond(config: Any, longest: int) -> bool:
    """Tell whether a path of `longest` tokens is longer than the model's sliding window."""
    window = window_of(config)
    return window is not None and longest > window
