# SPDX-License-Identifier: Apache-2.0
"""A byte tokenizer."""

import pytest


@pytest.fixture(scope="session")
def tok():
    from helpers.pair_rows import byte_level

    return byte_level()
