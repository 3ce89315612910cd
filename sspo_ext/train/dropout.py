# SPDX-License-Identifier: Apache-2.0
"""Turns dropout off for a whole training, so that policy and reference are the same function."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of a model and of its adapters to 0.

    Rates are found by name, since models keep them in many places: in dropout modules, in attributes that attention
    reads (`attention_dropout`), in dictionaries of adapters (LoHa's `module_dropout`), and in the config, which some
    models read in forward (Falcon, Persimmon). The model's own config stays, so a saved model has its rates.

    Args:
        model: Any model. It is changed in place.
    """
    configs: dict[int, Any] = {}  # one copy for all layers
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if (is_dropout and name == "p") or "drop" in name.lower():
                setattr(module, name, _without(value))
        config = vars(module).get("config")
        if config is not None and not any(isinstance(part, PreTrainedModel) for part in module.modules()):
            if id(config) not in configs:
                configs[id(config)] = _config_without_dropout(config)
            module.config = configs[id(config)]


def _without(value: Any) -> Any:
    """A rate, or a dictionary of rates, as zeros; anything else as it is."""
    if isinstance(value, float):
        return 0.0
    if isinstance(value, dict):
        return {key: _without(rate) for key, rate in value.items()}
    return value


def _config_without_dropout(config: Any) -> Any:
    rates = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value]
    if not rates:
        return config
    config = copy.copy(config)
    for name in rates:
        setattr(config, name, 0.0)
    return config
