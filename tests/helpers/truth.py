# SPDX-License-Identifier: Apache-2.0
"""What the kernels of every backend are held to against float64: the rule, and a bound for each gradient element.

docs/numerics.md says what each part of the suite is held to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_fp64_rule(
    got: Tensor,
    same_dtype_torch: Tensor,  # what plain torch gives in the dtype under test
    truth: Tensor,  # float64
    reduction_length: int,  # how many numbers are reduced into one (the vocabulary for a softmax)
    name: str,
    scale: float | None = None,  # what rounding errors are relative to; default: the largest finite magnitude of truth
) -> None:
    """err(got, truth) <= 2 * err(same_dtype_torch, truth) + eps(got) * scale * log2(2 * reduction_length).

    Errors are maxima over the elements. NaN and infinities must stand where they stand in truth.
    """
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, is {truth.dtype}"
    shapes = {tuple(t.shape) for t in (got, same_dtype_torch, truth)}
    assert len(shapes) == 1, f"{name}: shapes differ: {shapes}"
    value, finite = got.detach().double(), truth.isfinite()
    special = ~finite
    assert torch.equal(value.isfinite(), finite), f"{name}: finite where truth is not, or the reverse"
    torch.testing.assert_close(value[special], truth[special], equal_nan=True, msg=f"{name}: NaN or infinity differs")
    if not finite.any():
        return
    target = truth[finite]
    error = (value[finite] - target).abs().max().item()
    other = (same_dtype_torch.detach().double()[finite] - target).abs()
    torch_error = other[other.isfinite()].max().item() if other.isfinite().any() else 0.0
    if scale is None:
        scale = target.abs().max().item()
    floor = torch.finfo(got.dtype).eps * scale * math.log2(2 * max(reduction_length, 1))
    assert error <= 2 * torch_error + floor, (
        f"{name}: error {error:.3e} against float64, torch's own {torch_error:.3e}, floor {floor:.3e}"
    )


def gradient_terms(
    logits: Tensor,  # (N, V), rows in any dtype
    labels: Tensor,  # (N,), -1: no label here
    weight: Tensor,  # (N,), the coefficient of each row, upstream gradient included
    a: float,
    c: float,
) -> Tensor:  # (N, V) float64
    """What float32 rounding is relative to in each element of the gradient of log-probs, for assert_rounded_once.

    |coef| * slope of the map * (softmax * (1 + |mapped logit| + |log-prob|) + onehot): the terms' sizes before they
    cancel, and an exponent known to eps times its size.
    """
    rows = logits.detach().double()
    z = a * rows if c == 0 else c * torch.tanh(a * rows)
    logps = z.log_softmax(-1)
    p = logps.exp()
    terms = torch.where(p > 0, p * (1 + z.abs() + logps.abs()), 0.0)  # a masked token may be -inf away
    known = (labels >= 0).nonzero()[:, 0]
    terms[known, labels[known]] += 1
    return terms * (weight.detach().double().abs() * a * (c or 1.0))[:, None]


def assert_rounded_once(got: Tensor, truth: Tensor, terms: Tensor, name: str, units: float = 4.0) -> None:
    """|got - truth| <= half a unit in the last place of truth + units * eps(float32, float64 for float64) * terms.

    Held by each element for its own size: a bound from the largest element, which is a label's, would not see the
    softmax of a large vocabulary at all.
    """
    assert truth.dtype == torch.float64 and got.shape == truth.shape == terms.shape, f"{name}: shapes or dtypes differ"
    wide, kind = torch.finfo(torch.promote_types(got.dtype, torch.float32)), torch.finfo(got.dtype)
    largest = terms[terms.isfinite()].max().item() if terms.isfinite().any() else 0.0
    # below the smallest normal number float32 may flush to zero, and a dtype's numbers are evenly spaced
    smallest = wide.tiny * max(largest, 1.0) + kind.tiny * kind.eps / 2
    allowed = kind.eps / 2 * truth.abs() + units * wide.eps * terms + smallest
    finite = truth.isfinite()
    times = ((got.detach().double() - truth).abs() / allowed)[finite]
    worst = times.max().item() if times.numel() else 0.0
    assert worst <= 1, f"{name}: an element is {worst:.4g} times as far off as it may be"
