"""The one accuracy rule of this project, used for every backend and never relaxed."""

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
