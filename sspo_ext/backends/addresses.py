# SPDX-License-Identifier: Apache-2.0
"""Addresses of tensors, as compiled kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None, dtype: torch.dtype, numel: int, device: torch.device | str = "cpu") -> int:
    """Address of a contiguous tensor of this type and size, 0 for None.

    Kernels trust it, so the check is no assert, which -O would drop.
    """
    if tensor is None:
        return 0
    if (
        tensor.dtype != dtype
        or tensor.numel() != numel
        or not tensor.is_contiguous()
        or tensor.device != torch.device(device)
    ):
        raise TypeError(
            f"expected a contiguous tensor of {numel} {dtype} on {device}, got {tuple(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )
    return tensor.data_ptr()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
