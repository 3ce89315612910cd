# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of a Hugging Face model, under both of its names: `cache`, and `past_key_values` before 5.24."""

from __future__ import annotations

from typing import Any

from torch import nn

from .wrappers import takes


def cache_input(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the argument of the model's forward that hands it a cache, by the name that this forward has for it."""
    return {"cache" if takes(model, "cache") else "past_key_values": cache}


def cache_of(outputs: Any) -> Any:
    """Return the cache among a model's outputs; None if there is none, as in a plain tuple."""
    # Newer outputs have both names, and warn of the old one.
    return getattr(outputs, "cache" if hasattr(outputs, "cache") else "past_key_values", None)
