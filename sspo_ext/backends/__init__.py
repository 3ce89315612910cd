# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: argument `backend=` > SSPO_BACKEND > the table below.

A backend is a module with `why_not(device, dtype)` and the row and step functions that `ops.py` calls. `reference` is
plain torch, differentiated by autograd.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)

BACKENDS = ("cpu", "triton", "cuda", "reference")

# Fastest first. `reference` runs on every device and ends each list.
_TABLE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def constant_when_compiled(fn: _Function) -> _Function:
    """`torch.compiler.assume_constant_result` without its import of torch._dynamo, which takes as long as torch's."""
    fn._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # the mark that dynamo looks for
    return fn


def load(name: str) -> ModuleType:
    """The backend's module."""
    path = f"{__name__}.{name}"
    return sys.modules.get(path) or importlib.import_module(path)  # import_module alone takes microseconds each time


def why_not(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason why backend `name` cannot take such tensors, or None. It looks at device, dtype and build alone."""
    return load(name).why_not(torch.device(device), dtype)


def reasons(device: torch.device, dtype: torch.dtype) -> str:
    """Each backend that cannot run here, with its reason."""
    told = {name: why_not(name, device, dtype) for name in BACKENDS}
    return "; ".join(f"{name}: {reason}" for name, reason in told.items() if reason is not None)


@constant_when_compiled
def select(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs.

    "auto" takes the first usable one of the table; a name that cannot run raises with the reason.
    """
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


@constant_when_compiled
def has_policy_kernels(name: str) -> bool:
    """Whether policy losses are launches of this backend; elsewhere they are torch operations."""
    return hasattr(load(name), "policy_loss_fwd")


@constant_when_compiled
def with_reductions(requested: str, name: str) -> str:
    """The backend that runs entropy, sum_p2 and kl: `name`, which `select` has chosen, if it has their kernels.

    Otherwise "auto" takes the reference, and a backend that was asked for by name raises.
    """
    if hasattr(load(name), "row_reductions_fwd") or name == "reference":
        return name
    if requested == "auto" and not os.environ.get("SSPO_BACKEND"):
        return "reference"
    raise ValueError(
        f"backend: {name!r} has no entropy, sum_p2 or kl; 'cpu', 'triton' and 'reference' have, each on its devices"
    )
