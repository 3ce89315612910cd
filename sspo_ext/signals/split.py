"""Split a response into steps: from its text at data time, or from token ids alone on the device."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

SplitBy = str | re.Pattern


def split_text(text: str, by: SplitBy = "newline") -> list[tuple[int, int]]:
    """Character spans of the steps of `text`; they tile it."""
    raise NotImplementedError


def token_step_ids(
    text: str,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
) -> list[int]:
    """The step of every token, from a fast tokenizer's offset mapping."""
    raise NotImplementedError


def delimiter_mask(
    tokenizer,
    by: SplitBy = "newline",
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> Tensor:
    """What each token of the vocabulary does to a step: (V,) uint8 classes, or (V,) bool for a regular expression."""
    raise NotImplementedError


def step_ids_from_tokens(
    input_ids: Tensor,  # (B, T) int64
    response_mask: Tensor,  # (B, T) bool or int, 1 = response token that may be scored
    delimiters: Tensor,  # (V,) from delimiter_mask, or any (V,) bool: True ends a step
) -> Tensor:  # (B, T) int64: 0, 1, 2.. per sequence, -1 where response_mask is 0
    """Step ids on the device: no text, no sync, no Python loop."""
    raise NotImplementedError
