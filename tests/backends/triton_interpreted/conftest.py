# SPDX-License-Identifier: Apache-2.0
"""Where kernels run on a GPU, test_triton_kernels.py runs these files in an interpreting process of their own."""

import importlib.util
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
