# SPDX-License-Identifier: Apache-2.0
"""The CPU module's transpose of 16-bit matrices, which the linear route needs for a GEMM with a block of gradients."""

import pytest
import torch

from sspo_ext.backends import cpu

needs_module = pytest.mark.skipif(
    cpu.why_not(torch.device("cpu"), torch.bfloat16) is not None, reason="the C++ module is not built"
)


@needs_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols", [(1, 1), (7, 9), (8, 8), (8, 33), (261, 40), (300, 1031), (512, 2048)])
def test_transposed(dtype, rows, cols):
    matrix = torch.randn(rows, cols + 5).to(dtype)[:, 2 : cols + 2]
    scratch = torch.full((rows * cols + 3,), 7.0, dtype=dtype)
    assert torch.equal(cpu.transposed(matrix, scratch), matrix.t())
    assert (scratch[rows * cols :] == 7).all(), "written beyond the block"


@needs_module
def test_other_elements_are_refused():
    with pytest.raises(TypeError, match="16-bit"):
        cpu.transposed(torch.zeros(4, 4), torch.zeros(16))
