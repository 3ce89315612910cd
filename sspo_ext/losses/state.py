# SPDX-License-Identifier: Apache-2.0
"""State that a loss carries from batch to batch, in a module whose buffers are saved with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_positive
from ..layout.pairs import StepPairs
from .common import all_reduce
from .pref import StepPrefOutput


class RewardMean(nn.Module):
    """BCO's reward shift (arXiv 2404.04656): a running mean of chosen and rejected rewards, saved by `state_dict`.

    A batch is trained with the shift of the batches before it. TRL's former BCO trainer added the batch first.

    Args:
        momentum: None: the mean over everything seen; a number in (0, 1]: the step of an exponential moving average.

    Raises:
        TypeError: The momentum is no number.
        ValueError: The momentum is outside (0, 1].

    Examples:
        >>> shift, ref = RewardMean(), step_logps(torch.randn_like(logits), layout)
        >>> out = step_pref_loss(logits, layout, pairs, ref=ref, loss_type="bco_pair", margins=shift.margins(pairs))
        >>> shift.update(out)
    """

    mean: Tensor  # () float64
    count: Tensor  # () float64: rewards seen

    def __init__(self, momentum: float | None = None):
        super().__init__()
        if momentum is not None:
            check_positive("momentum", momentum)
            if momentum > 1:
                raise ValueError(f"momentum: expected None or a number in (0, 1], got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def margins(self, pairs: StepPairs) -> Tensor:
        """The shift for every pair.

        Args:
            pairs: StepPairs.

        Returns:
            (P,) float32, on the device of the pairs.
        """
        return self.mean.to(pairs.index.device, torch.float32).expand(pairs.num_pairs).contiguous()

    @torch.no_grad()
    def update(self, out: StepPrefOutput, group=None) -> None:
        """Adds the rewards of a batch's valid pairs, both sides. No host sync.

        Args:
            out: the batch's StepPrefOutput.
            group: data-parallel ranks whose rewards to add; None: this rank alone.
        """
        rewards, valid = out.rewards[out.pairs.index.long()].double(), out.pairs.valid
        total = torch.where(valid[:, None], rewards, torch.zeros_like(rewards)).sum()
        total, count = all_reduce(torch.stack([total, 2.0 * valid.sum()]), group).to(self.mean.device)
        batch = total / count.clamp(min=1)
        seen = self.count + count
        step = count / seen.clamp(min=1) if self.momentum is None else torch.where(self.count > 0, self.momentum, 1.0)
        self.mean += torch.where(count > 0, step * (batch - self.mean), torch.zeros_like(self.mean))
        self.count.copy_(seen)

    def extra_repr(self) -> str:
        """The momentum."""
        return f"momentum={self.momentum}"
