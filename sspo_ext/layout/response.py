# SPDX-License-Identifier: Apache-2.0
"""Layouts of tokens whose log-probs an engine has computed already: no labels, and every token may be scored.

A layout of labels has no row for a sequence's first token, which nothing predicts. Here the first column is the first
token of a response, and the engine has its log-prob from the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_integer, check_shape, check_tensor, describe


def response_fields(mask: Tensor, step_ids: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """The fields of a StepLayout without labels; `StepLayout.from_response` documents the arguments."""
    check_tensor("mask", mask, ndim=2 if cu_seqlens is None else 1)
    kept = mask.cpu().numpy() != 0
    lengths = _lengths(mask, cu_seqlens)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    if step_ids is None:
        ids = np.zeros(kept.size, np.int64)
    else:
        check_integer("step_ids", step_ids)
        check_shape("step_ids", step_ids, tuple(mask.shape))
        ids = step_ids.cpu().numpy().astype(np.int64).reshape(-1)
    # a step of a later sequence is above every step of an earlier one, so one running maximum serves all
    longest = int(lengths.max()) if len(lengths) else 0
    running = np.maximum.accumulate(ids + sequence * (longest + 1)) - sequence * (longest + 1)
    for bad, expected in (
        (ids < -1, "0, 1, 2, ... or -1 (not scored)"),
        (ids >= longest, f"ids below the longest sequence's length {longest}"),
        ((ids >= 0) & (ids < running), "ids that never go back along a sequence"),
    ):
        if step_ids is not None and bad.any():
            at = int(np.flatnonzero(bad)[0])
            where = at - int((np.cumsum(lengths) - lengths)[sequence[at]])
            raise ValueError(
                f"step_ids: expected {expected}, got {int(ids[at])} in sequence {int(sequence[at])} at position {where}"
            )

    steps = np.zeros(len(lengths), np.int64)
    np.maximum.at(steps, sequence, ids + 1)
    base = np.cumsum(steps) - steps
    step_sequence = np.repeat(np.arange(len(lengths)), steps)
    flat = np.flatnonzero(kept.reshape(-1) & (ids >= 0))
    of_row = ids[flat] + base[sequence[flat]]
    offsets = np.zeros(len(step_sequence) + 1, np.int64)
    np.cumsum(np.bincount(of_row, minlength=len(step_sequence)), out=offsets[1:])
    sequence_offsets = offsets[np.searchsorted(step_sequence, np.arange(len(lengths) + 1))]
    device = mask.device

    def tensor(array, dtype):
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=dtype).to(device, non_blocking=True)

    return {
        "rows": tensor(flat - 1, torch.int64),
        "labels": tensor(flat[:0], torch.int64),
        "weights": None,
        "step_offsets": tensor(offsets, torch.int32),
        "step_of_row": tensor(of_row, torch.int64),
        "step_sequence": tensor(step_sequence, torch.int32),
        "sequence_offsets": tensor(sequence_offsets, torch.int32),
        "row_of": tensor(flat[:0], torch.int32),
        "shape": tuple(mask.shape) if cu_seqlens is None else (1, mask.shape[0]),
        "num_sequences": len(lengths),
        "host_step_offsets": torch.from_numpy(offsets),
        "host_step_sequence": torch.from_numpy(np.array(step_sequence, np.int64)),
        "host_sequence_offsets": torch.from_numpy(sequence_offsets),
        "max_label": None,
        "one_row_per_step": bool((np.diff(offsets) == 1).all()),
    }


def _lengths(mask: Tensor, cu_seqlens: Tensor | None) -> np.ndarray:
    """(B,): tokens of each sequence, padding included."""
    if cu_seqlens is None:
        return np.full(mask.shape[0], mask.shape[1], np.int64)
    check_integer("cu_seqlens", cu_seqlens, ndim=1)
    edges, total = cu_seqlens.cpu().numpy().astype(np.int64), mask.shape[0]
    if len(edges) < 1 or edges[0] != 0 or edges[-1] != total or (np.diff(edges) < 0).any():
        raise ValueError(
            f"cu_seqlens: expected 0 <= ... <= {total} (the length of the mask), never falling, got "
            f"{describe(edges.tolist())}"
        )
    return np.diff(edges)


def refuse_logits(num_rows: int, num_labels: int) -> None:
    """Raises for a layout without labels, which only losses of log-probs take."""
    if num_labels != num_rows:
        raise ValueError(
            "layout: expected one with labels beside logits or hidden states (StepLayout.from_step_ids), got one of "
            "StepLayout.from_response, which policy_loss and pref_loss take beside log-probs"
        )
