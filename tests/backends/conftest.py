# SPDX-License-Identifier: Apache-2.0
"""Each instruction set that this machine has."""

import pytest
from helpers.cpu_rows import ISAS

from sspo_ext.backends import cpu


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SSPO_CPU_ISA", request.param)
    assert cpu._C.isa() == request.param
    return request.param
