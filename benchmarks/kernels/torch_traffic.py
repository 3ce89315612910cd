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

# `_unsafe_view` is a view whose schema does not say so
_MAKES_ONLY = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


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
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not is_free(func):
            loaded, stored = operand_bytes(func, args, kwargs, out)
            self.traffic.launches += 1
            self.traffic.loaded += loaded
            self.traffic.stored += stored
        return out


def is_free(func) -> bool:
    """Whether an operation moves nothing: it makes a view or an empty tensor."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return is_view or func.overloadpacket.__name__ in _MAKES_ONLY


def operand_bytes(func, args, kwargs, out) -> tuple[int, int]:
    """(bytes loaded, bytes stored) by an operation. A result that is given as `out=` is not loaded."""
    name = func.overloadpacket.__name__
    kept = {n: v for n, v in kwargs.items() if n != "out"}
    inputs = [t for t in tree_leaves((args, kept)) if isinstance(t, torch.Tensor)]
    results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    if name == "index_select":
        stored = results[0].nbytes
        return stored + inputs[-1].nbytes, stored
    if name in ("index_copy", "index_copy_"):
        return inputs[1].nbytes + inputs[2].nbytes, inputs[2].nbytes
    if name in _SPARSE:
        touched = min(t.numel() for t in inputs)
        return touched * sum(t.itemsize for t in inputs), touched * sum(t.itemsize for t in results)
    stored = sum(t.nbytes for t in results)
    return (0 if name in _FILLS else sum(t.nbytes for t in inputs)), stored


@contextlib.contextmanager
def count_torch() -> Iterator[TorchTraffic]:
    """Counts the bytes that every torch operation inside it must move. Views and allocations move none."""
    traffic = TorchTraffic()
    with _Counter(traffic):
        yield traffic
