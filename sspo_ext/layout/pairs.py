# SPDX-License-Identifier: Apache-2.0
"""Which step should be preferred to which: (winner, loser) indices of a layout's steps, built on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_kind, check_shape, describe
from .bundle import Built, Steps, TensorBundle, constant


@dataclass(frozen=True, eq=False, repr=False)
class StepPairs(Built, TensorBundle):
    """P pairs of steps. Build it with `from_index`.

    The adjacency (`adj_offsets`, `adj_pairs`) lists the pairs of each step; the kernels read it.

    Examples:
        >>> pairs = StepPairs.from_index(layout, torch.tensor([[0, 1], [0, 2]]), weights=torch.tensor([1.0, 0.5]))
        >>> out = step_pref_loss(logits, layout, pairs, reference_free=True)
    """

    index: Tensor  # (P, 2) int32: winner step, loser step
    adj_offsets: Tensor  # (S + 1,) int32, CSR: the pairs each step is in
    adj_pairs: Tensor  # (2P,) int32: 2 * pair + side, side 0 when the step is the winner
    valid: Tensor  # (P,) bool: both steps have scored tokens
    mean_scale: Tensor  # () float32: 1 / number of valid pairs, or 0 when there are none
    weights: Tensor | None  # (P,) float32
    margins: Tensor | None  # (P,) float32, in units of the reward
    soft_labels: Tensor | None  # (P,) float32: probability that the winner is the better step
    num_valid: int
    host_index: Tensor  # (P, 2) int64
    host_step_offsets: Tensor  # of the layout they were made for

    @property
    def num_steps(self) -> int:
        """S of the layout they were made for."""
        return self.host_step_offsets.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """P, dropped pairs included."""
        return self.index.shape[0]

    @property
    def num_dropped(self) -> int:
        """Pairs with an empty step. They add nothing to the loss and do not count in its mean."""
        return self.num_pairs - self.num_valid

    def __repr__(self) -> str:
        sizes = f"pairs={self.num_pairs}, dropped={self.num_dropped}, steps={self.num_steps}"
        return f"StepPairs({sizes}, device={self.index.device})"

    @classmethod
    def from_index(
        cls,
        layout: Steps,
        index: Tensor,
        *,
        weights: Tensor | None = None,
        margins: Tensor | None = None,
        soft_labels: Tensor | None = None,
    ) -> StepPairs:
        """Checks the pairs against the layout and moves them to its device.

        A step may be in any number of pairs. An index on a device is copied to the host once (a sync).

        Args:
            layout: the StepLayout whose steps are paired.
            index: (P, 2) int: winner step and loser step, as numbered in the layout.
            weights: (P,) float, multiply the pairs' losses.
            margins: (P,) float, subtracted from the difference of the rewards.
            soft_labels: (P,) float in [0, 1], the probability that the winner is the better step.

        Returns:
            StepPairs on the layout's device.

        Raises:
            TypeError: The index is not of integers, or a constant not of floats.
            ValueError: An index is outside [0, S), a step is paired with itself, or a shape does not fit.

        Examples:
            >>> pairs = StepPairs.from_index(layout, torch.tensor([[0, 1]]))
        """
        check_kind("layout", layout, Steps, "a StepLayout")
        index = index if isinstance(index, Tensor) else _as_index(index)
        if index.numel() == 0:
            index = index.reshape(0, 2).to(torch.int64)
        check_integer("pairs", index, ndim=2)
        check_shape("pairs", index, (index.shape[0], 2))
        host = index.cpu().numpy().astype(np.int64)
        steps = layout.num_steps
        outside = (host < 0) | (host >= steps)
        if outside.any():
            p, side = (int(i) for i in np.argwhere(outside)[0])
            raise ValueError(f"pairs: expected step indices in [0, {steps}), got {int(host[p, side])} in pair {p}")
        same = host[:, 0] == host[:, 1]
        if same.any():
            p = int(np.flatnonzero(same)[0])
            raise ValueError(f"pairs: expected two different steps, got step {int(host[p, 0])} twice in pair {p}")

        flat = host.reshape(-1)
        adj_pairs = np.argsort(flat, kind="stable")
        adj_offsets = np.zeros(steps + 1, np.int64)
        np.cumsum(np.bincount(flat, minlength=steps), out=adj_offsets[1:])
        counts = np.diff(layout.host_step_offsets.numpy())
        valid = (counts[host] > 0).all(axis=1)
        device = layout.device

        def tensor(array, dtype):
            return torch.from_numpy(np.array(array, order="C")).to(dtype).to(device, non_blocking=True)

        num_valid = int(valid.sum())
        pairs = cls(
            index=tensor(host, torch.int32),
            adj_offsets=tensor(adj_offsets, torch.int32),
            adj_pairs=tensor(adj_pairs, torch.int32),
            valid=tensor(valid, torch.bool),
            mean_scale=tensor(1.0 / num_valid if num_valid else 0.0, torch.float32),
            weights=None,
            margins=None,
            soft_labels=None,
            num_valid=num_valid,
            host_index=torch.from_numpy(host),
            host_step_offsets=layout.host_step_offsets,
        )
        return pairs.with_values(weights=weights, margins=margins, soft_labels=soft_labels)

    def with_values(
        self, *, weights: Tensor | None = None, margins: Tensor | None = None, soft_labels: Tensor | None = None
    ) -> StepPairs:
        """The same pairs with other constants; None keeps what was there.

        Args:
            weights: (P,) float, multiply the pairs' losses.
            margins: (P,) float, subtracted from the difference of the rewards.
            soft_labels: (P,) float in [0, 1], the probability that the winner is the better step.

        Returns:
            StepPairs with these constants, detached.

        Raises:
            TypeError: A constant is no float tensor.
            ValueError: A shape does not fit, or a soft label is no probability.

        Examples:
            >>> with_margins = pairs.with_values(margins=torch.zeros(pairs.num_pairs))
        """
        given = {"weights": weights, "margins": margins, "soft_labels": soft_labels}
        for name, value in given.items():
            if value is not None:
                check_float(name, value)
                check_shape(name, value, (self.num_pairs,))
        if soft_labels is not None and soft_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = soft_labels[~((soft_labels >= 0) & (soft_labels <= 1))]
            if outside.numel():
                raise ValueError(f"soft_labels: expected probabilities in [0, 1], got {outside[0].item()}")
        device = self.index.device
        constants = {k: constant(v).to(device, non_blocking=True) for k, v in given.items() if v is not None}
        if weights is not None:  # the weight of a dropped pair may be NaN; no backend sees it
            constants["weights"] = torch.where(self.valid, constants["weights"], 0)
        return replace(self, **constants)

    def units(self) -> np.ndarray:
        """(S,) int64: the connected component of each step, -1 for a step in no pair.

        Losses of different components are independent.
        """
        return connected_steps(self.host_index.numpy(), self.num_steps)


def index_pairs(step_sequence: Tensor, num_sequences: int) -> np.ndarray:
    """(P, 2): step k of sequence i and step k of sequence i + B/2; see `StepLayout.pair_by_index`."""
    half, odd = divmod(num_sequences, 2)
    if odd:
        raise ValueError(
            "pairs: expected an even number of sequences [chosen_0.., rejected_0..] to pair by index, "
            f"got {num_sequences}; pass pairs explicitly"
        )
    counts = np.bincount(step_sequence.numpy(), minlength=num_sequences)
    first = np.cumsum(counts) - counts
    common = np.minimum(counts[:half], counts[half:])
    k = np.arange(common.sum()) - np.repeat(np.cumsum(common) - common, common)
    chosen, rejected = np.repeat(first[:half], common) + k, np.repeat(first[half:], common) + k
    return np.stack([chosen, rejected], axis=1)


def _as_index(index: object) -> Tensor:
    try:
        return torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # by what it is made of
        raise TypeError(f"pairs: expected (P, 2) step numbers, got {describe(index)}") from None


def connected_steps(index: np.ndarray, num_steps: int) -> np.ndarray:
    """(S,) int64: the smallest step of each step's connected component.

    It is -1 for a step in no pair of `index` (P, 2).
    """
    parent = np.arange(num_steps)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for winner, loser in index.tolist():
        a, b = root(winner), root(loser)
        parent[max(a, b)] = min(a, b)
    unit = np.full(num_steps, -1, np.int64)
    for step in np.unique(index):
        unit[step] = root(step)
    return unit
