# SPDX-License-Identifier: Apache-2.0
"""The arguments of `step_loss_fwd`, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepLossArguments(NamedTuple):
    """One formula over N rows, S steps and P pairs, in the order of the op's schema.

    Tensors are contiguous and on one device; the floating ones share a dtype.
    """

    logps: Tensor  # (N,) float: log-prob of each row
    weights: Tensor | None  # (N,)
    step_offsets: Tensor  # (S + 1,) int32, CSR over rows
    ref: Tensor | None  # (S,) step sums of the reference
    pair_index: Tensor  # (P, 2) int32: winner step, loser step
    adj_offsets: Tensor  # (S + 1,) int32, CSR: the pairs each step is in
    adj_pairs: Tensor  # (2 P,) int32: 2 * pair + side
    pair_weights: Tensor | None  # (P,)
    pair_margins: Tensor | None  # (P,)
    pair_labels: Tensor | None  # (P,)
    scale: Tensor  # () multiplies the sum over pairs
    formula: str
    options: list[float]
    label: float  # every pair's, where pair_labels is None
