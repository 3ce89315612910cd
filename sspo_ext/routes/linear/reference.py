# SPDX-License-Identifier: Apache-2.0
"""The linear route in plain torch: the scored rows' logits, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import reference
from ...layout.steps import StepLayout
from ..kept import narrowed
from ..tree_rows import to_tokens
from .settings import LinearCall, LinearSettings


def reference_tokens(call: LinearCall) -> Tensor:
    """(N,) token log-probs."""
    layout, settings = call.layout, call.settings
    rows = torch.arange(layout.rows.shape[0], device=call.hidden.device)
    logits = reference_logits(call.hidden, call.weight, call.bias, layout, settings)
    return to_tokens(reference.token_logps(logits, rows, layout.labels, settings.a, settings.c), layout)


def reference_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, settings: LinearSettings
) -> Tensor:
    """(1, U, V) logits of the scored rows."""
    dtype = settings.dtype
    bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden[layout.rows].to(dtype), weight.to(dtype), bias)
    every = torch.arange(logits.shape[0], device=logits.device)
    return narrowed(logits, every, layout.kept)[None]
