# SPDX-License-Identifier: Apache-2.0
"""Steps of a packed batch given as spans of tokens: each within one sequence, in ascending order."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .tokens import Tokens


def packed_tokens(cu_seqlens: Tensor, step_offsets: Tensor, total: int) -> tuple[Tokens, np.ndarray, int]:
    """Step, sequence and position of each token of a packed batch, the sequence of each step, and how many there are.

    See `StepLayout.from_offsets`.
    """
    cu = cu_seqlens.cpu().numpy().astype(np.int64)
    if len(cu) < 1 or cu[0] != 0 or cu[-1] != total or (np.diff(cu) < 0).any():
        raise ValueError(
            f"cu_seqlens: expected 0 <= ... <= {total} (the length of labels), never falling, got {cu.tolist()}"
        )
    spans = checked_spans(step_offsets.cpu().numpy().astype(np.int64), total)
    lengths = np.diff(cu)
    tokens = Tokens(
        step=step_of_token(spans, total)[None],
        sequence=np.repeat(np.arange(len(lengths)), lengths)[None],
        position=(np.arange(total) - np.repeat(cu[:-1], lengths))[None],
    )
    return tokens, sequence_of_spans(spans, cu), len(lengths)


def checked_spans(step_offsets: np.ndarray, total: int) -> np.ndarray:
    """(S, 2) ascending spans within [0, total] from S + 1 offsets or from (S, 2) spans."""
    spans = step_offsets
    if spans.ndim == 1:
        if len(spans) == 0:
            raise ValueError("step_offsets: expected S + 1 offsets or (S, 2) spans, got an empty tensor")
        if spans[0] != 0 or spans[-1] != total:
            raise ValueError(
                f"step_offsets: expected S + 1 offsets from 0 to {total} (the length of labels), got {spans[0]} to "
                f"{spans[-1]}; pass (S, 2) spans to leave tokens out"
            )
        spans = np.stack([spans[:-1], spans[1:]], axis=1)
    if spans.shape[1:] != (2,):
        raise ValueError(f"step_offsets: expected shape (S + 1,) or (S, 2), got {spans.shape}")
    start, end = spans[:, 0], spans[:, 1]
    bad = (start < 0) | (end < start) | (end > total)
    bad[1:] |= start[1:] < end[:-1]
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"step_offsets: expected ascending spans within [0, {total}], got {spans[k].tolist()} for step {k}"
        )
    return spans


def sequence_of_spans(spans: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """(S,): the sequence that each span is in; ValueError for a span that crosses a boundary."""
    start, end = spans[:, 0], spans[:, 1]
    # side="right" - 1 skips zero-length sequences; an empty step at the very end belongs to the last sequence
    owner = np.minimum(np.searchsorted(cu_seqlens, start, side="right") - 1, max(len(cu_seqlens) - 2, 0))
    if len(spans) and len(cu_seqlens) < 2:
        raise ValueError("step_offsets: expected no steps, since cu_seqlens names no sequence")
    crossing = (end > start) & (end > cu_seqlens[np.minimum(owner + 1, len(cu_seqlens) - 1)])
    if crossing.any():
        k = int(np.flatnonzero(crossing)[0])
        raise ValueError(
            f"step_offsets: expected every step inside one sequence, got step {k} = {spans[k].tolist()}, "
            f"which crosses the boundary at {int(cu_seqlens[owner[k] + 1])}"
        )
    return owner


def step_of_token(spans: np.ndarray, total: int) -> np.ndarray:
    """(total,): the span that each token is in, -1 for a token between spans."""
    start, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    step = np.full(total, -1, np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    step[np.repeat(start, lengths) + within] = np.repeat(np.arange(len(spans)), lengths)
    return step
