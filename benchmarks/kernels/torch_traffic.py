# SPDX-License-Identifier: Apache-2.0
"""Bytes that torch operations must read and write: every operand once, every result once.

This is a lower bound for eager torch on any device. It misses what an operation reads more than once: a softmax reads
its row two or three times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These access as many elements as their index has, not the whole indexed tensor.
_SPARSE = ("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index", "index_select", "index_put_")

_FILLS = ("zeros", "new_zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "fill", "zero_", "fill_")

_MAKES_ONLY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


@dataclass
class TorchTraffic:
    launches: int = 0
    loaded: int = 0  # bytes
    stored: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, traffic: TorchTraffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or name in _MAKES_ONLY:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.traffic.launches += 1
        if name in _SPARSE:
            touched = min(t.numel() for t in inputs)
            self.traffic.loaded += touched * sum(t.itemsize for t in inputs)
            self.traffic.stored += touched * sum(t.itemsize for t in results)
            return out
        self.traffic.stored += sum(t.numel() * t.itemsize for t in results)
        if name not in _FILLS:
            self.traffic.loaded += sum(t.numel() * t.itemsize for t in inputs)
        return out


@contextlib.contextmanager
def count_torch() -> Iterator[TorchTraffic]:
    """Counts the bytes that every torch operation inside it must move. Views and allocations move none."""
    traffic = TorchTraffic()
    with _Counter(traffic):
        yield traffic
