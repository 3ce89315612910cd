# SPDX-License-Identifier: Apache-2.0
"""The text of `sspo-ext info`: what runs on this machine, and why something does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .. import __version__, backends

_OPTIONAL = ("triton", "transformers", "accelerate", "peft", "trl", "flash-attn")

_SETTINGS = ("SSPO_BACKEND", "SSPO_CPU_ISA", "TRITON_INTERPRET")


def report() -> str:
    """Versions, devices, each backend with the reason why it cannot run, and which one `backend="auto"` takes."""
    lines = [
        f"sspo_ext {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} {platform.system()}",
        f"cpu: {torch.get_num_threads()} threads{_isa()}",
        f"gpu: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can see'}",
        "",
    ]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for name in backends.BACKENDS:
            reason = backends.why_not(name, device, torch.float32)
            lines.append(f"{device} / {name}: {'runs' if reason is None else reason}")
        lines.append(f"{device}: auto takes {_auto(device)}")
    if len(devices) == 1:
        for name in ("triton", "cuda"):
            lines.append(f"cuda / {name}: {backends.why_not(name, 'cuda', torch.bfloat16) or 'would run on a GPU'}")
    built = backends.load("cuda").info()
    lines += [f"{name} of the CUDA module: {value}" for name, value in built.items()]
    lines += ["", *(f"{name}: {_version(name)}" for name in _OPTIONAL)]
    lines += [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    return "\n".join(lines)


def _auto(device: str) -> str:
    try:
        return backends.select("auto", device, torch.float32)
    except ValueError as error:
        return f"nothing: {error}"


def _isa() -> str:
    try:
        from .. import _C
    except ImportError:
        return ""
    return f", instruction set {_C.isa()}" if hasattr(_C, "isa") else ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
