# SPDX-License-Identifier: Apache-2.0
"""What the backends share about memory and modules: addresses, pools, and whether a compiled module fits this code."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..formulas.generated_hash import FORMULAS_HASH


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
        or not (tensor.is_cpu if device == "cpu" else tensor.device == torch.device(device))
    ):
        raise TypeError(
            f"expected a contiguous tensor of {numel} {dtype} on {device}, got {tuple(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )
    return tensor.data_ptr()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_private_pool(tensor: Tensor) -> bool:
    """Whether a GPU tensor lies in a memory pool that somebody may take away, such as that of a CUDA graph.

    `torch.compile(mode="reduce-overhead")` runs a graph once before it is captured, with the graph's pool in use.
    """
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # an allocator of somebody else's
        return True
    address = tensor.data_ptr()
    for segment in segments:
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    return True


def stale_module(module: ModuleType) -> str | None:
    """Why a compiled module does not fit this Python code, or None.

    Kernels know a formula by its number. A module that numbers or computes them otherwise would give the numbers of
    another loss. It warns, since without the module a call runs on torch alone.
    """
    if getattr(module, "formulas", None) == FORMULAS_HASH:
        return None
    reason = f"{module.__name__} was built from other formulas than this Python code has; build it again"
    warnings.warn(f"{reason}: pip install . (or pip install -e . in a clone)", stacklevel=3)
    return reason
