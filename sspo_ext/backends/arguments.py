# SPDX-License-Identifier: Apache-2.0
"""The arguments of `step_loss_fwd` and of the policy kernels, the same for every backend."""

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


class PolicyConstantsArguments(NamedTuple):
    """What the constants of a policy loss are made from, in the order of the op's schema."""

    advantages: Tensor | None  # (S,) float32; None: they come for each row
    step_of_row: Tensor  # (N,) int64
    weights: Tensor | None  # (N,)
    old: Tensor | None  # (N,) float32, for the threshold
    offsets: Tensor | None  # (U + 1,) int32: the steps or sequences over which the loss is a mean
    items: Tensor | None  # (): the norm is one over it
    counts: bool  # the norm is one over the rows, or with offsets the steps or sequences, that count
    threshold: float  # rows count whose old probability is below it; 0: all do
    norm: float  # the norm without items and counts


class PolicyLossArguments(NamedTuple):
    """A policy loss over N rows in U segments, in the order of the op's schema.

    Tensors are contiguous and on one device; the floating ones share a dtype.
    """

    logps: Tensor  # (N,)
    old: Tensor | None  # (N,)
    ref: Tensor | None  # (N,)
    entropy: Tensor | None  # (N,)
    advantage: Tensor  # (N,)
    scale: Tensor  # (N,)
    norm: Tensor  # ()
    offsets: Tensor | None  # (U + 1,) int32: the segments that share a ratio; None: each token has its own
    formula: str
    options: list[float]
    length_normalize: bool
    kl_estimator: str
    kl_coef: float
    entropy_coef: float
