# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels read and write, against the least that the work needs.

benchmarks/kernels/traffic.py counts it.

Meant to fail here: unscored rows read in the backward; the masked pass of a row loading all its lanes; a row read again
for the label's gradient; a fourth launch.
"""

import os
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")
traffic = pytest.importorskip("benchmarks.kernels.traffic", reason="not a checkout of the repository")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="has a GPU: kernels are not interpreted in this process"
)
V, DTYPES = 2507, (torch.bfloat16, torch.float32)


def count(*methods):
    return [asdict(traffic.measure(method, V, dtype)) for method in methods for dtype in DTYPES]


def test_ours_is_the_minimum():
    for row in count("sspo_ext step_pref_loss", "sspo_ext, in place"):
        assert row["launches"] == 3, row
        assert 1 <= row["read_forward"] <= 1.02 and row["written_forward"] <= 0.02, row
        assert 1 <= row["read_backward"] <= 1.02 and 1 <= row["written_backward"] <= 1.02, row
        assert 1 <= row["of_minimum"] <= 1.02, row


def test_the_counter_sees_a_second_read():
    """Liger's cross-entropy reads its rows twice and writes the gradient, in one launch."""
    pytest.importorskip("liger_kernel")
    for row in count("liger cross_entropy, upstream 1"):
        assert row["launches"] == 1 and 2 <= row["read_forward"] <= 2.01 and 1 <= row["written_forward"] <= 1.01, row
