# SPDX-License-Identifier: Apache-2.0
"""torch.library's checks of an op."""

import torch

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op, args: tuple, dtype: torch.dtype = torch.float32) -> None:
    """All of them in float32; another dtype is traced alike, and only its schema, aliasing and fakes are checked."""
    torch.library.opcheck(op, args, test_utils=TESTS if dtype == torch.float32 else TESTS[:3])
