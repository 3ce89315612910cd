# SPDX-License-Identifier: Apache-2.0
"""Values with their derivatives: differentiates an elementwise definition where autograd cannot record.

That is inside an op, below the dispatcher's autograd keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor


class Dual:
    """value + slope * e with e * e = 0, elementwise: a function of it carries its derivative as the slope.

    It knows the operations of the policy losses and raises NotImplementedError for any other.
    """

    def __init__(self, value: Tensor, slope: Tensor):
        self.value, self.slope = value, slope

    @classmethod
    def variable(cls, value: Tensor) -> Dual:
        return cls(value, torch.ones_like(value))

    def detach(self) -> Tensor:
        """A constant, as under autograd."""
        return self.value

    def __add__(self, other) -> Dual:
        value, slope = _parts(other)
        return Dual(self.value + value, self.slope + slope)

    def __mul__(self, other) -> Dual:
        value, slope = _parts(other)
        return Dual(self.value * value, self.slope * value + self.value * slope)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __sub__(self, other) -> Dual:
        return self + -other

    def __rsub__(self, other) -> Dual:
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        if rule is None:
            raise NotImplementedError(f"{func}: no derivative here yet, add its rule to dual.py")
        return rule(*args, **(kwargs or {}))


def derivative(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of an elementwise function at a tensor; `fn` sees a Dual in the tensor's place."""
    return cast(Dual, fn(cast(Tensor, Dual.variable(at)))).slope


def _parts(x) -> tuple[Tensor | float, Tensor | float]:
    return (x.value, x.slope) if isinstance(x, Dual) else (x, 0.0)


def _exp(x: Dual) -> Dual:
    y = torch.exp(x.value)
    return Dual(y, y * x.slope)


def _expm1(x: Dual) -> Dual:
    return Dual(torch.expm1(x.value), torch.exp(x.value) * x.slope)


def _square(x: Dual) -> Dual:
    return Dual(torch.square(x.value), 2 * x.value * x.slope)


def _clamp(x: Dual, min: float | None = None, max: float | None = None) -> Dual:
    y = torch.clamp(x.value, min, max)
    return Dual(y, torch.where(y == x.value, x.slope, 0.0))  # passed on at a bound too, as torch before 2.14


def _minimum(x: Dual | Tensor, y: Dual | Tensor) -> Dual:
    """The slope is the mean of both where the two are equal, as in torch."""
    (a, da), (b, db) = ((v.value, v.slope) if isinstance(v, Dual) else (v, torch.zeros_like(v)) for v in (x, y))
    return Dual(torch.minimum(a, b), torch.where(a < b, da, torch.where(b < a, db, (da + db) / 2)))


_RULES = {
    torch.exp: _exp,
    torch.expm1: _expm1,
    torch.square: _square,
    torch.clamp: _clamp,
    torch.minimum: _minimum,
    torch.Tensor.add: lambda x, y: y + x,
    torch.Tensor.mul: lambda x, y: y * x,
    torch.Tensor.sub: lambda x, y: -y + x,
}
