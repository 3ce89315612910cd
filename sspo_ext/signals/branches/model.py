# SPDX-License-Identifier: Apache-2.0
"""What engines need from a model: its logits at some positions, its dtype and its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.forward import forward_logits_at, logits_of
from ...hf.wrappers import UnsupportedHead, takes, unwrap

_ROWS = 1024  # rows of logits that are converted to float32 at a time


def logits_at(model: nn.Module, positions: Tensor, *, use_cache: bool = False, **inputs: Any) -> tuple[Tensor, Any]:
    """Return ((N, V) logits at flattened positions, the model's outputs).

    The vocabulary projection runs for these positions alone if the model's head can be hooked. Otherwise it runs for
    the columns that contain them if the model takes `logits_to_keep`, and else for all positions.
    """
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        inputs["output_router_logits"] = False  # the balance loss is not needed here, and fails on 4-D masks
    try:
        return forward_logits_at(model, positions, use_cache=use_cache, **inputs)
    except UnsupportedHead:
        pass
    if takes(model, "use_cache"):
        inputs["use_cache"] = use_cache
    width = inputs["input_ids"].shape[1]
    # Counted from the right: virtual tokens of PEFT's prompts stand before the text.
    row, column = positions // width, positions % width - width
    if takes(model, "logits_to_keep"):
        kept, column = column.unique(return_inverse=True)
        inputs["logits_to_keep"] = kept
    outputs = model(**inputs)
    return logits_of(outputs)[row, column], outputs


def label_logps(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Return the (N,) log_softmax(logits)[label], in float32 at least, one block of rows at a time."""
    target = torch.tensor(labels, device=logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [
        -torch.nn.functional.cross_entropy(rows.to(dtype), some, reduction="none")
        for rows, some in zip(logits.split(_ROWS), target.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).clamp(max=0)
