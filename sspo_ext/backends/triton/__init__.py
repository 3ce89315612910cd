# SPDX-License-Identifier: Apache-2.0
"""Triton backend: the launches of the logits route, the row kernels with further reductions, the policy losses.

It can be imported without Triton and without a GPU; `why_not` says what is missing.
"""

from __future__ import annotations

import os

import torch

try:
    from .policy_constants import policy_constants
    from .policy_loss_fwd import policy_loss_fwd
    from .row_reductions_bwd import row_reductions_bwd
    from .row_reductions_fwd import row_reductions_fwd
    from .scale_rows import scale_rows
    from .step_loss_fwd import step_loss_fwd
    from .token_logp_bwd import token_logp_bwd
    from .token_logp_fwd import token_logp_fwd

    _import_error = None
except ImportError as error:
    _import_error = f"triton cannot be imported: {error}"

# Triton reads this when kernels are defined, so it is read here at the same moment.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = [
    "policy_constants",
    "policy_loss_fwd",
    "row_reductions_bwd",
    "row_reductions_fwd",
    "scale_rows",
    "step_loss_fwd",
    "token_logp_bwd",
    "token_logp_fwd",
    "why_not",
]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this kind cannot take this backend, or None."""
    if _import_error is not None:
        return _import_error
    if dtype not in _DTYPES:
        return f"its kernels take float32, bfloat16 and float16 logits, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and not _INTERPRETED:
        return (
            "Triton runs on a GPU; on the CPU only interpreted, with TRITON_INTERPRET=1 set before sspo_ext is imported"
        )
    if device.type not in ("cpu", "cuda"):
        return f"not tried on {device.type} devices"
    return None
