# SPDX-License-Identifier: Apache-2.0
"""Hidden states and the LM head of Hugging Face causal LMs, wrapped or not, without a patched `forward`."""

from .check import check_head
from .forward import forward_hidden, forward_logits_at
from .head import LMHead, model_head
from .whole_head import with_head
from .wrappers import UnsupportedHead, eval_mode, unwrap

__all__ = [
    "LMHead",
    "UnsupportedHead",
    "check_head",
    "eval_mode",
    "forward_hidden",
    "forward_logits_at",
    "model_head",
    "unwrap",
    "with_head",
]
