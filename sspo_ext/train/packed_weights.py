# SPDX-License-Identifier: Apache-2.0
"""Weights laid out once for many products with few rows, which is what generation on a CPU consists of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

_WORTH = 1 << 16  # numbers in a weight; below, the call itself is what takes time
_DTYPES = (torch.float32, torch.bfloat16)


@contextlib.contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Lets the model's linear layers compute with weights in oneDNN's own layout, on CPUs.

    `torch.nn.functional.linear` brings a weight into that layout at every call. The copies are as large as the weights.
    Where autocast is on, they are in its dtype and stand for the copies that it would keep. Layers that are no plain
    `nn.Linear`, whole in this process, stay as they are.

    Args:
        model: A model without gradients meanwhile.
        rows: About how many rows a product has.
    """
    packed = {module: _packed(module, rows) for module in model.modules() if _is_plain(module)}
    for module, forward in packed.items():
        module.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for module in packed:
            del module.forward  # pyright: ignore[reportAttributeAccessIssue]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.numel() >= _WORTH
        and _dtype(weight) in _DTYPES and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
        and _bf16_is_there(_dtype(weight))
    )  # fmt: skip


def _bf16_is_there(dtype: torch.dtype) -> bool:
    """False for bfloat16 on CPUs for which oneDNN has none."""
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _packed(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    dtype = _dtype(module.weight)
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().to(dtype), rows)
    bias = None if module.bias is None else module.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")

    return forward
