"""What the engines ask of a model: its logits at some positions, its dtype and its device."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.forward import forward_logits_at
from ...hf.wrappers import UnsupportedHead, unwrap

_ROWS = 1024  # of logits that are brought to float32 at a time


def logits_at(model: nn.Module, positions: Tensor, *, use_cache: bool = False, **inputs: Any) -> tuple[Tensor, Any]:
    """((N, V) logits at flattened positions, the model's outputs). The vocabulary projection is computed for them alone
    where the model has a head that can be hooked; else by logits_to_keep for the columns they are in; else whole."""
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        inputs["output_router_logits"] = False  # a balance loss, which is of no use here, fails on masks of our own
    try:
        return forward_logits_at(model, positions, use_cache=use_cache, **inputs)
    except UnsupportedHead:
        pass
    if takes(model, "use_cache"):
        inputs["use_cache"] = use_cache
    width = inputs["input_ids"].shape[1]
    # counted from the right, since virtual tokens of PEFT's prompts stand before the text
    row, column = positions // width, positions % width - width
    if takes(model, "logits_to_keep"):
        kept, column = column.unique(return_inverse=True)
        inputs["logits_to_keep"] = kept
    outputs = model(**inputs)
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits[row, column], outputs


def label_logps(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """(N,) log_softmax(logits)[label] in float32 at least, a block of rows at a time."""
    target = torch.tensor(labels, device=logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [
        -torch.nn.functional.cross_entropy(rows.to(dtype), some, reduction="none")
        for rows, some in zip(logits.split(_ROWS), target.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).clamp(max=0)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    inner = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return name in inspect.signature(inner.forward).parameters


def model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
