# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that scales kept gradients, interpreted, against torch.

Shown to fail by breaking the kernel: rows of scale 0 read (NaN), the second block dropped, the scale rounded to the
dtype of the gradient.
"""

import pytest
import torch

from sspo_ext.backends import triton as backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2047), (2, 2049), (5, 4100), (3, 4096), (2, 64), (0, 3)])
@pytest.mark.parametrize("in_place", [True, False])
def test_scaled_in_float32_and_rounded_once(dtype, shape, in_place):
    g = torch.Generator().manual_seed(0)
    padded = torch.randn(shape[0], shape[1] + (3 if shape[1] % 64 else 64), generator=g).to(dtype)
    for scale in (torch.tensor(1 / 3).expand(shape[0]), torch.rand(shape[0], 2, generator=g)[:, 0]):
        kept = padded.clone()[:, : shape[1]]
        want = (kept.float() * scale[:, None]).to(dtype)
        out = kept if in_place else torch.full_like(kept, float("nan"))
        backend.scale_rows(kept, scale, out)
        assert torch.equal(out, want)


def test_rows_of_scale_0_are_zeros():
    kept = torch.full((3, 7), float("nan"))
    kept[1] = 1.0
    backend.scale_rows(kept, torch.tensor([0.0, 2.0, 0.0]), kept)
    assert kept.tolist() == [[0.0] * 7, [2.0] * 7, [0.0] * 7]
