# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a Hugging Face model, under both of its names: `cache`, and `past_key_values` before 5.24."""

from __future__ import annotations

from typing import Any

from torch import nn

from .wrappers import base_model, takes, text_config, unwrap

_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # the layer types that keep keys and values


def has_virtual_tokens(model: nn.Module) -> bool:
    """Tell whether a PEFT adapter puts tokens of its own before the text, at every forward."""
    return getattr(getattr(unwrap(model), "active_peft_config", None), "is_prompt_learning", False)


def why_no_cache(model: nn.Module) -> str | None:
    """Return why the model does not fill an empty DynamicCache with the text it reads; None if it seems to."""
    if has_virtual_tokens(model):
        return "its adapter puts virtual tokens before the text"
    if getattr(base_model(model), "_is_stateful", False):
        return "it keeps a state instead"
    others = sorted(set(getattr(text_config(model), "layer_types", None) or ()) - _ATTENTIONS)
    return f"it has layers of the types {', '.join(others)}" if others else None


def cache_input(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the argument of the model's forward that hands it a cache, by the name that this forward has for it.

    Not for a model with virtual tokens: one of the two caches, PEFT's and this, would be lost.
    """
    return {"cache" if takes(model, "cache") else "past_key_values": cache}


def cache_of(outputs: Any) -> Any:
    """Return the cache among a model's outputs; None if there is none, as in a plain tuple."""
    # Newer outputs have both names, and warn of the old one.
    return getattr(outputs, "cache" if hasattr(outputs, "cache") else "past_key_values", None)
