# SPDX-License-Identifier: Apache-2.0
"""Pictures drawn again from stored numbers, against the committed ones."""

from pathlib import Path

import numpy as np
import pytest


def assert_same_picture(new: Path, committed: Path) -> None:
    """The same pixels. Another version of matplotlib may place them otherwise: then the test is skipped."""
    image = pytest.importorskip("PIL.Image")
    with image.open(new) as ours, image.open(committed) as theirs:
        if ours.info["Software"] != theirs.info["Software"]:
            pytest.skip(f"drawn by {ours.info['Software']}, committed by {theirs.info['Software']}")
        assert ours.size == theirs.size, committed.name
        different = np.any(np.asarray(ours) != np.asarray(theirs), axis=-1)
    assert not different.any(), f"{committed.name}: {different.sum()} pixels differ"
