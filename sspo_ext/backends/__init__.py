"""Which implementation runs: argument `backend=` > SSPO_BACKEND > the table below.

A backend is a module with `why_not(device, dtype)` and the row and step functions `ops.py` calls; `reference` is
autograd on plain torch.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("cpu", "triton", "cuda", "reference")

# Fastest first. `reference` is right on every device and ends each list.
_TABLE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference"), "xpu": ("triton", "reference")}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def why_not(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason backend `name` cannot take tensors of this kind, or None. Looks at device, dtype and build alone."""
    return load(name).why_not(torch.device(device), dtype)


def reasons(device: torch.device, dtype: torch.dtype) -> str:
    """Why each backend that cannot run here cannot."""
    told = {name: why_not(name, device, dtype) for name in BACKENDS}
    return "; ".join(f"{name}: {reason}" for name, reason in told.items() if reason is not None)


@torch.compiler.assume_constant_result
def select(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs. "auto" takes the first usable one of the table; a name that cannot run raises with the
    reason."""
    source = "backend"
    if requested == "auto":
        requested, source = os.environ.get("SSPO_BACKEND") or "auto", "SSPO_BACKEND"
    if requested == "auto":
        names = _TABLE.get(device_type, ("reference",))
        return next(name for name in names if why_not(name, device_type, dtype) is None)
    if requested not in BACKENDS:
        raise ValueError(f"{source}: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    reason = why_not(requested, device_type, dtype)
    if reason is not None:
        raise ValueError(
            f"{source}: {requested!r} cannot run on {device_type} {str(dtype).removeprefix('torch.')}: {reason}"
        )
    return requested


@torch.compiler.assume_constant_result
def with_reductions(requested: str, name: str) -> str:
    """`name`, which `select` has chosen, if it has the kernels with further reductions over the vocabulary; "auto"
    goes on to the reference, a name that was asked for raises."""
    if hasattr(load(name), "row_reductions_fwd") or name == "reference":
        return name
    if requested == "auto" and not os.environ.get("SSPO_BACKEND"):
        return "reference"
    raise ValueError(
        f"backend: {name!r} has no entropy, sum_p2 or kl; 'cpu', 'triton' and 'reference' have, each on its devices"
    )
