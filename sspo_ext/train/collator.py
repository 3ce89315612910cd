"""Batch tokenized preference rows, padded or packed, and build the step layout on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class StepPreferenceCollator:
    """Sequences in the order [chosen of every row..., rejected of every row...]."""

    pad_token_id: int
    packed: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None

    def __call__(self, features: Sequence[dict]) -> dict:
        raise NotImplementedError
