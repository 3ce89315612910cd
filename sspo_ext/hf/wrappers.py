# SPDX-License-Identifier: Apache-2.0
"""The wrappers around a model: how to look through them, where the LM head is, and which models are refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# PEFT's kinds whose virtual tokens stand before the text in the logits.
_PREPENDS_POSITIONS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")

_WAY_OUT = "use route='logits'"


class UnsupportedHead(ValueError):
    """The model's logits are not softcap(scale * (hidden @ weight.T + bias)) of one plain weight.

    The message names the model's class, the reason and a way out.
    """


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face or PEFT model inside DDP, FSDP1, DeepSpeed and torch.compile wrappers.

    Args:
        model: a model, wrapped any number of times or not at all.

    Returns:
        The innermost model that is not one of these wrappers. A PEFT model is returned as it is.

    Examples:
        >>> unwrap(torch.nn.parallel.DataParallel(model)) is model
        True
    """
    while True:
        for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
            wrapped = model._modules.get(name)
            if wrapped is not None and not hasattr(type(model), "get_output_embeddings"):
                model = wrapped
                break
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside all wrappers, PEFT's too."""
    inner = unwrap(model)
    get = getattr(inner, "get_base_model", None)
    return inner if get is None else get()


def takes(model: nn.Module, name: str) -> bool:
    """Tell whether the model's forward has this parameter by name."""
    return name in inspect.signature(base_model(model).forward).parameters


def text_config(model: nn.Module) -> Any:
    """Return the config of the model's decoder; None for a model without a config."""
    config = getattr(unwrap(model), "config", None)
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first float parameter; float32 for a model without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without one."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def find_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return (Hugging Face or PEFT model, its output embeddings), after all checks that need no weight."""
    if isinstance(model, nn.DataParallel):
        raise unsupported(model, "runs replicas of the model in threads", "use DistributedDataParallel")
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
        raise unsupported(model, "with static_graph=True reduces gradients only through its own outputs", "unset it")
    inner = unwrap(model)
    if "_fsdp_wrapped_module" in model._modules:
        # Whether the weight is whole after a forward depends on FSDP1's options, and can differ between ranks.
        raise unsupported(inner, "is wrapped in FSDP1", "use FSDP2 (fully_shard)")
    for module in (model, inner):
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise unsupported(
                inner,
                "is compiled as a whole, and a graph compiled earlier ignores a new hook",
                "compile its decoder (model.model.compile()) or its layers instead",
            )
    for config in getattr(inner, "peft_config", {}).values():
        kind = getattr(config, "peft_type", None)
        if getattr(kind, "value", kind) in _PREPENDS_POSITIONS:
            raise unsupported(inner, f"prepends virtual tokens to the logits ({getattr(kind, 'value', kind)})")
    get = getattr(inner, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, nn.Module):
        raise unsupported(inner, "has no output embeddings (get_output_embeddings() gives none)")
    return inner, head


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in eval mode, and restore each module's own mode at the end.

    Args:
        model: any module.

    Yields:
        Nothing.

    Examples:
        >>> with torch.no_grad(), eval_mode(model):
        ...     logits = model(input_ids).logits
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unsupported(model: nn.Module, what: str, way_out: str | None = None) -> UnsupportedHead:
    """Make the error for a model whose LM head cannot be used."""
    get = getattr(model, "get_base_model", None)
    name = type(model if get is None else get()).__name__
    return UnsupportedHead(f"{name}: {what}; {f'{way_out}, or ' if way_out else ''}{_WAY_OUT}")
