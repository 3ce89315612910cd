# SPDX-License-Identifier: Apache-2.0
"""A copy of the sources."""

import shutil

import pytest
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built, so that nothing is written into the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "sspo_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy
