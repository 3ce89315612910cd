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

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.policy import step_policy_loss

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


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_gradient_is_written_and_not_read(dtype, entropy_coef):
    """A policy loss with an advantage of 0 for one of two sequences; an entropy bonus moves its rows too."""
    work = traffic.Work(V, dtype)
    logits = work.logits.clone().requires_grad_()
    layout = StepLayout.from_step_ids(work.labels, work.step_ids)
    out = step_policy_loss(
        logits, layout, torch.tensor([0.0, 1.0]), entropy_coef=entropy_coef, backend="triton", loss_type="ppo"
    )
    with traffic.count_traffic() as backward:
        out.loss.backward()
    read = 1 if entropy_coef else 0.5
    assert read <= backward.loaded / work.scored_bytes <= read + 0.02
    assert 1 <= backward.stored / work.gradient_bytes <= 1.02


def test_the_counter_sees_a_second_read():
    """Liger's cross-entropy reads its rows twice and writes the gradient, in one launch."""
    pytest.importorskip("liger_kernel")
    for row in count("liger cross_entropy, upstream 1"):
        assert row["launches"] == 1 and 2 <= row["read_forward"] <= 2.01 and 1 <= row["written_forward"] <= 1.01, row
