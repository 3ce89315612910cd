# SPDX-License-Identifier: Apache-2.0
"""A dispatch mode in which nothing may wait for a device, as it shows on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a value, or makes a shape of values.
_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "masked_select",
    "is_nonzero",
    "repeat_interleave.Tensor",
    "equal",
)


class NoSync(TorchDispatchMode):
    """Raises where an operation would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        boolean = "index" in name and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool
            for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        sized = kwargs.get("output_size") is not None
        if boolean or (name.lstrip("_").startswith(tuple(w.lstrip("_") for w in _WAITS)) and not sized):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)
