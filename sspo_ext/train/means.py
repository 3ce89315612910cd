# SPDX-License-Identifier: Apache-2.0
"""Means of metrics over the pairs, steps or rows that they describe, whatever the sizes of the batches."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layout.steps import StepLayout
from ..losses.policy import StepPolicyOutput
from ..losses.pref import StepPrefOutput

_POLICY_METRICS = (
    "kl", "entropy", "ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "steps/logps", "steps/tokens",
)  # fmt: skip

_COUNTS = ("pairs/count", "pairs/dropped", "steps/count", "steps/empty")


class Means:
    """Sums the metrics of a preference loss, on the device, until `pop`. A NaN stays a NaN."""

    def __init__(self):
        self.sums: dict[str, float | Tensor] = defaultdict(float)

    @torch.no_grad()
    def add(self, out: StepPrefOutput) -> None:
        """Adds the metrics of one batch, each times the number of pairs or steps it is a mean of."""
        metrics = out.metrics
        for name, value in metrics.items():
            count = 1 if name in _COUNTS else metrics["steps/count" if name.startswith("steps/") else "pairs/count"]
            self.sums[name] += value.float() * count
        weights = out.pairs.weights
        self.sums["loss"] += (out.pair_losses if weights is None else out.pair_losses * weights).sum().float()

    def pop(self, accelerator) -> dict[str, float]:
        """Returns means, and totals of counts, over all batches and processes, and starts again.

        This is the only place that waits for the device.
        """
        if not self.sums:
            return {}
        stacked = torch.stack([torch.as_tensor(value) for value in self.sums.values()])
        total = accelerator.reduce(stacked, "sum").tolist()
        sums = dict(zip(self.sums, total, strict=True))
        self.sums.clear()

        def mean(name: str) -> float:
            return sums[name] / max(sums["steps/count" if name.startswith("steps/") else "pairs/count"], 1)

        return {name: sums[name] if name in _COUNTS else mean(name) for name in sums}


class Sums:
    """Sums named values and their counts, on the host or the device, until `pop`."""

    def __init__(self):
        self.sums: dict[str, list] = defaultdict(lambda: [0.0, 0])
        self.largest: dict[str, Tensor] = {}

    def add(self, name: str, total: float | Tensor, count: float = 1) -> None:
        """Adds the sum of `count` values."""
        entry = self.sums[name]
        entry[0], entry[1] = entry[0] + total, entry[1] + count

    def add_correction(self, metrics: Mapping[str, Tensor], layout: StepLayout) -> None:
        """Adds the metrics of a `RolloutCorrection`: means over tokens, and maxima, of which the largest is kept."""
        for name, value in metrics.items():
            if name.endswith("/max"):
                self.largest[name] = torch.maximum(value, self.largest.get(name, value))
            else:
                self.add(name, value * layout.num_rows, layout.num_rows)

    def add_loss(self, out: StepPolicyOutput, layout: StepLayout) -> None:
        """Adds the metrics of a policy loss, each times the number of tokens or steps it is a mean of."""
        for name, value in out.metrics.items():
            if name in _POLICY_METRICS:
                count = layout.num_steps if name.startswith("steps/") else layout.num_rows
                self.add(name, value.detach().float() * count, count)

    @contextlib.contextmanager
    def phase(self, name: str):
        """Adds the seconds that the block takes as "time/name"."""
        began = time.perf_counter()
        yield
        self.add(f"time/{name}", time.perf_counter() - began)

    def forget(self, *names: str) -> None:
        """Drops what was added under these names."""
        for name in names:
            self.sums.pop(name, None)

    def pop(self, accelerator, device: torch.device) -> dict[str, float]:
        """Returns means and maxima over all processes, and starts again. Only this waits for the device."""
        if not self.sums:
            return {}
        pairs = torch.stack(
            [torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in v]) for v in
             self.sums.values()]
        )  # fmt: skip
        totals = accelerator.reduce(pairs, "sum")
        if self.largest:
            mine = torch.stack([value.double() for value in self.largest.values()])
            # beside the totals: the host waits once
            totals = torch.cat([totals, accelerator.gather(mine[None]).amax(0)[:, None].expand(-1, 2)])
        totals = totals.tolist()
        means = {name: total / max(count, 1e-9) for name, (total, count) in zip(self.sums, totals, strict=False)}
        means |= {name: value for name, (value, _) in zip(self.largest, totals[len(self.sums) :], strict=True)}
        self.sums.clear()
        self.largest.clear()
        return means
