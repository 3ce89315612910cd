"""Metrics as means over pairs and steps, whatever the sizes of the batches they came from."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..losses import StepPrefOutput

_COUNTS = ("pairs/count", "pairs/dropped", "steps/count", "steps/empty")


class Means:
    """Sums of a loss's metrics and of their counts, kept on the device until `pop`. A NaN stays one."""

    def __init__(self):
        self.sums: dict[str, Tensor] = defaultdict(float)

    @torch.no_grad()
    def add(self, out: StepPrefOutput) -> None:
        metrics = out.metrics
        for name, value in metrics.items():
            count = 1 if name in _COUNTS else metrics["steps/count" if name.startswith("steps/") else "pairs/count"]
            self.sums[name] += value.float() * count
        weights = out.pairs.weights
        self.sums["loss"] += (out.pair_losses if weights is None else out.pair_losses * weights).sum().float()

    def pop(self, accelerator) -> dict[str, float]:
        """Means over what was added, on all processes, and totals of counts. The one host sync."""
        if not self.sums:
            return {}
        total = accelerator.reduce(torch.stack(list(self.sums.values())), "sum").tolist()
        sums = dict(zip(self.sums, total, strict=True))
        self.sums.clear()

        def mean(name: str) -> float:
            return sums[name] / max(sums["steps/count" if name.startswith("steps/") else "pairs/count"], 1)

        return {name: sums[name] if name in _COUNTS else mean(name) for name in sums}
