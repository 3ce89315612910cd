# SPDX-License-Identifier: Apache-2.0
"""vLLM with two processes of a trainer, against its stand-in: what they ask together, and who sends weights.

What was broken -> red: prompts not gathered, answers not split where a process's own begin, the second process sends
weights as well.
"""

import pytest

pytest.importorskip("transformers")

from helpers.launch import torchrun


@pytest.mark.slow
def test_two_processes():
    assert "same answers" in torchrun("helpers.ranks.vllm_two_ranks")
