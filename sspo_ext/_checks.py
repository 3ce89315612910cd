# SPDX-License-Identifier: Apache-2.0
"""Checks of public arguments. A message names the argument, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LARGEST = 1.7976931348623157e308  # of float64: an int above it has no float

_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def describe(value: object) -> str:
    """A value in a few words, for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_tensor(name: str, value: object, *, ndim: tuple[int, ...] | int | None = None) -> Tensor:
    """`value`, if it is a tensor with one of these numbers of dimensions; else TypeError or ValueError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(value)}")
    dims = (ndim,) if isinstance(ndim, int) else ndim
    if dims is not None and value.ndim not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got {describe(value)}")
    return value


def check_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless `value` is a tensor of this shape."""
    if tuple(check_tensor(name, value).shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {describe(value)}")


def check_integer(name: str, value: object, *, ndim: tuple[int, ...] | int | None = None) -> None:
    """TypeError or ValueError unless `value` is a tensor of integers."""
    if check_tensor(name, value, ndim=ndim).dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name}: expected an integer tensor, got {describe(value)}")


def check_float(name: str, value: object, *, ndim: tuple[int, ...] | int | None = None) -> None:
    """TypeError or ValueError unless `value` is a tensor of a dtype in FLOAT_DTYPES."""
    if check_tensor(name, value, ndim=ndim).dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {describe(value)}")


def check_choice(name: str, value: object, choices: Collection) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """TypeError unless `value` is an instance of `kind`, which the message calls `expected`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def check_bool(name: str, value: object) -> None:
    """TypeError unless `value` is True or False."""
    check_kind(name, value, bool, "True or False")


def check_number(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not abs(value) <= _LARGEST:  # math.isfinite is not traced by torch.compile
        raise ValueError(f"{name}: expected a finite number, got {_short(value)}")


def check_positive(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not 0 < value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number above 0, got {_short(value)}")


def check_not_negative(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a finite number, 0 or above."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, 0 or above, got {_short(value)}")


def check_whole(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a whole number of 64 bits, got {_short(value)}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """TypeError or ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {_short(value)}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected a whole number of 64 bits, got {_short(value)}")


def _short(value: float) -> str:
    """A number in a few characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def check_num_items(value: object) -> None:
    """TypeError or ValueError unless `value` is a number or a 0-dim tensor. The value of a GPU tensor is not read."""
    if isinstance(value, Tensor):
        check_shape("num_items", value, ())
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    check_not_negative("num_items", value)


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    """ValueError unless `value` is on `device`, where the argument `of` is."""
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where {of} is, got {describe(value)}")
