# SPDX-License-Identifier: Apache-2.0
"""The batch that adapters are tested with."""

import pytest
from helpers.engine_batch import engine_batch


@pytest.fixture
def batch():
    """Step ids, mask, advantages of steps, old and new log-probs (4, 7)."""
    return engine_batch()
