"""Values with their derivatives: differentiates an elementwise definition where autograd cannot record, below the
dispatcher's autograd keys in an op that torch.compile runs."""

from __future__ import annotations

import torch
from torch import Tensor


class Dual:
    """value + slope * e with e * e = 0, elementwise: a function of it carries its derivative as the slope.

    Knows what the policy losses are made of, and raises for anything else.
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
    return Dual(y, torch.where(y == x.value, x.slope, 0.0))  # at a bound the slope passes, as torch's does


def _minimum(x, y) -> Dual:
    """Where the two are equal, the mean of their slopes, as torch has it."""
    (a, da), (b, db) = _parts(x), _parts(y)
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
