# SPDX-License-Identifier: Apache-2.0
"""The policy's weights as another engine wants them: the checkpoint's names, adapters merged, shards gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .model_call import hf_model
from .sharded import whole


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights one after the other, under their names in the checkpoint.

    Sharded weights (FSDP2) are gathered one at a time. The weights of a layer with an adapter are copies into which the
    adapter is merged. The layer's own stay as they are, bit by bit: to merge and to unmerge would round them twice.

    Args:
        model: The policy, with or without an adapter.

    Returns:
        An iterator of (name, weight).

    Raises:
        ValueError: For adapters that cannot be merged: prompt learning, and `model.add_adapter` without a PeftModel.
    """
    kinds = getattr(model, "peft_config", None) or {}
    if kinds and not hasattr(model, "merge_adapter"):
        names = ", ".join(getattr(config.peft_type, "value", str(config.peft_type)) for config in kinds.values())
        raise ValueError(
            f"rollout_engine: 'vllm' takes a model's weights, into which {names} cannot be merged here; use 'generate'"
        )
    return _whole(_once(_named_weights(_checkpoints_model(model), "")))


def weight_shapes(model: nn.Module) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and whole shape of what `policy_weights` yields, in its order. Nothing is gathered or merged.

    Args:
        model: The policy, with or without an adapter.

    Returns:
        A tuple for each weight.
    """
    weights = _once(_named_weights(_checkpoints_model(model), "", merge=False))
    return [(name, weight.dtype, tuple(weight.shape)) for name, weight, _ in weights]


def _checkpoints_model(model: nn.Module) -> nn.Module:
    kinds = getattr(model, "peft_config", None)
    return hf_model(model).get_base_model() if kinds else model


def _once(weights: Iterator[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tied weights under their first name."""
    seen = set()
    for name, weight, value in weights:
        if weight not in seen:
            seen.add(weight)
            yield name, weight, value


def _whole(weights: Iterator[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, _, value in weights:
        with torch.no_grad():
            yield name, whole(value.detach())


def _named_weights(module: nn.Module, prefix: str, merge: bool = True) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Parameters under the names that they have without PEFT and without checkpoint wrappers, and their values."""
    parts = {name: part for name, part in module._modules.items() if part is not None}
    for inside in ("base_layer", "token_adapter", "_checkpoint_wrapped_module"):
        if inside in parts:  # everything beside it belongs to the adapter
            adapted = merge and inside == "base_layer" and hasattr(module, "merge")
            yield from _merged(module, prefix) if adapted else _named_weights(parts[inside], prefix, merge)
            return
    if "modules_to_save" in parts:
        copies = hf_model(parts["modules_to_save"])
        active = [copies[name] for name in hf_model(module).active_adapters if name in copies]
        yield from _named_weights(active[0] if active else parts["original_module"], prefix, merge)
        return
    for name, weight in module._parameters.items():
        if weight is not None:
            yield prefix + name, weight, weight
    for name, part in parts.items():
        yield from _named_weights(part, f"{prefix}{name}.", merge)


def _merged(layer: Any, prefix: str) -> list[tuple[str, Tensor, Tensor]]:
    """The weights of a layer, and copies of them with the layer's active adapters merged."""
    base = layer.base_layer
    before = list(_named_weights(base, prefix))
    if layer.merged or layer.disable_adapters:
        return before
    owners = {part: dict(part._parameters) for part in base.modules()}
    saved = {weight: _local(weight).clone() for weight in base.parameters()}
    try:
        layer.merge()
        merged = {name: whole(value.detach()).clone() for name, _, value in _named_weights(base, prefix)}
    finally:
        for part, parameters in owners.items():
            part._parameters.update(parameters)
        for weight, value in saved.items():
            _local(weight).copy_(value)
        layer.merged_adapters.clear()
    return [(name, weight, merged[name]) for name, weight, _ in before]


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process has."""
    weight = weight.detach()
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()
