"""State that a loss carries from batch to batch: a module whose buffers are saved with the model; nothing is hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_positive
from .common import all_reduce
from .pref import StepPrefOutput


class RewardMean(nn.Module):
    """BCO's reward shift: a running mean of chosen and rejected rewards, in buffers (`state_dict` saves them).

    `momentum=None` is the mean over everything seen; a number in (0, 1] is an exponential moving average's step. The
    shift that a batch is trained with comes from the batches before it; TRL's former BCO trainer took this batch in
    first.

    Example::

        >>> shift = RewardMean()
        >>> out = step_pref_loss(logits, layout, pairs, ref=ref, loss_type="bco_pair", margins=shift.margins(pairs))
        >>> shift.update(out)
    """

    def __init__(self, momentum: float | None = None):
        super().__init__()
        if momentum is not None:
            check_positive("momentum", momentum)
            if momentum > 1:
                raise ValueError(f"momentum: expected None or a number in (0, 1], got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def margins(self, pairs) -> Tensor:
        """(P,) float32: the shift for every pair."""
        return self.mean.to(pairs.index.device, torch.float32).expand(pairs.num_pairs).contiguous()

    @torch.no_grad()
    def update(self, out: StepPrefOutput, group=None) -> None:
        """Takes in the rewards of a batch's valid pairs, both sides; of all ranks of `group`. No host sync."""
        rewards, valid = out.rewards[out.pairs.index.long()].double(), out.pairs.valid
        total = torch.where(valid[:, None], rewards, torch.zeros_like(rewards)).sum()
        total, count = all_reduce(torch.stack([total, 2.0 * valid.sum()]), group).to(self.mean.device)
        batch = total / count.clamp(min=1)
        seen = self.count + count
        step = count / seen.clamp(min=1) if self.momentum is None else torch.where(self.count > 0, self.momentum, 1.0)
        self.mean += torch.where(count > 0, step * (batch - self.mean), torch.zeros_like(self.mean))
        self.count.copy_(seen)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"
