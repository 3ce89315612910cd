# SPDX-License-Identifier: Apache-2.0
"""What the losses of step log-probs share: log-ratios, sums over steps and sequences, normalisers.

These losses are torch ops on (S,) sums or (N,) tokens of `step_logps` or `linear_step_logps`. Such tensors are tiny
beside N x V, so autograd is fast enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_choice, check_device, check_float, check_integer, check_shape
from ..layout.bundle import constant
from ..layout.steps import StepLayout
from ..objective.pair_arguments import check_logps, check_reference_free
from ..objective.sums import StepLogps
from ..objective.values import divided, reference_sums, reference_tokens


@dataclass(frozen=True, eq=False)
class StepLossOutput:
    """What a loss of step log-probs returns. `loss` carries the gradient; everything else is detached."""

    loss: Tensor  # () float32 (float64 for float64 log-probs)
    losses: Tensor  # (U,) unweighted loss of each unit (step, sequence, pair or list); 0 for a unit without tokens
    rewards: Tensor  # (S,) beta * (S_k - S_k_ref)
    metrics: dict[str, Tensor] = field(repr=False, default_factory=dict)  # 0-dim, on the device


@dataclass(frozen=True)
class LossFunction:
    """A loss that is a function of StepLogps, for the catalogue."""

    name: str
    fn: Callable
    formula: str
    source: str
    use: str
    unit: str  # what its mean is over
    needs: str = ""  # beyond step log-probs


LOSS_FUNCTIONS: dict[str, LossFunction] = {}


def loss_function(name: str, **facts):
    """Registers the decorated function; `facts` are further fields of LossFunction."""

    def register(fn):
        assert name not in LOSS_FUNCTIONS
        LOSS_FUNCTIONS[name] = LossFunction(name, fn, **facts)
        return fn

    return register


def log_ratios(
    logps: StepLogps, layout: StepLayout, ref: StepLogps | Tensor | None, needed_by: str | None = None
) -> Tensor:
    """(S,): u_k = S_k - S_k_ref, or S_k without a reference."""
    check_logps("logps", logps, layout)
    if ref is None and needed_by is not None:
        raise ValueError(f"ref: {needed_by} needs a reference, got None")
    return _over_reference(logps, layout, ref)


def optional_log_ratios(
    name: str, logps: StepLogps, layout: StepLayout, ref: StepLogps | Tensor | None, reference_free: bool
) -> Tensor:
    """`log_ratios` for the public function `name`, called by it, which takes a reference unless `reference_free`."""
    check_logps("logps", logps, layout)
    check_reference_free(ref, reference_free, [name], stacklevel=5)
    return _over_reference(logps, layout, ref)


def _over_reference(logps: StepLogps, layout: StepLayout, ref: StepLogps | Tensor | None) -> Tensor:
    sums = reference_sums(ref, layout)
    return logps.sums if sums is None else logps.sums - sums.to(logps.sums.dtype)


def row_log_ratios(logps: StepLogps, layout: StepLayout, ref: StepLogps | Tensor, needed_by: str) -> Tensor:
    """(N,): log(pi / ref) of each scored token, detached; the reference must have tokens."""
    tokens = reference_tokens(ref, layout, needed_by)
    return (logps.tokens - tokens.to(logps.tokens.dtype)).detach()


class StepGrid:
    """Steps as a grid (B, K), one sequence a row, so that sums along a sequence are ordered and need no atomics."""

    def __init__(self, layout: StepLayout):
        sequence = layout.host_step_sequence
        counts = torch.bincount(sequence, minlength=layout.num_sequences)
        first = counts.cumsum(0) - counts
        position = torch.arange(len(sequence), device=sequence.device) - first[sequence]
        self.shape = (layout.num_sequences, int(counts.max()) if len(counts) else 0)
        self.index = (sequence * max(self.shape[1], 1) + position).to(layout.device, non_blocking=True)

    def spread(self, values: Tensor) -> Tensor:
        """(S,) -> (B, K), zeros after a sequence's last step."""
        batch, steps = self.shape
        return values.new_zeros(batch * steps).index_copy(0, self.index, values).view(batch, steps)

    def gather(self, grid: Tensor) -> Tensor:
        """(B, K) -> (S,)."""
        return grid.reshape(-1)[self.index]

    def sequence_sums(self, values: Tensor) -> Tensor:
        """(S,) -> (B,)."""
        return self.spread(values).sum(1)

    def suffix_sums(self, values: Tensor) -> Tensor:
        """(S,) -> (S,): each step's value and those of its sequence's later steps."""
        return self.gather(self.spread(values).flip(1).cumsum(1).flip(1))


def per_unit(name: str, value: Tensor, size: int, like: Tensor) -> Tensor:
    """A constant argument of shape (size,), checked, in the dtype of `like`."""
    check_float(name, value)
    check_shape(name, value, (size,))
    check_device(name, value, like.device, "the log-probs")
    return constant(value).to(like.dtype)


def unit_numbers(name: str, index: Tensor, layout: StepLayout, *, unit: str = "step", padded: bool = False) -> Tensor:
    """Numbers of steps, or of sequences, as int64; checked if they are on the host.

    With `padded`, a negative number stands for no unit.
    """
    check_integer(name, index)
    check_device(name, index, layout.device, "the layout")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        end = layout.num_steps if unit == "step" else layout.num_sequences
        low, high = (int(x) for x in index.aminmax())
        if high >= end or (low < 0 and not padded):
            expected = f"below {end}" if padded else f"in [0, {end})"
            raise ValueError(f"{name}: expected {unit} numbers {expected}, got {high if high >= end else low}")
    return index.long()


def reduce_units(
    losses: Tensor,  # (U,)
    valid: Tensor,  # (U,) bool
    weights: Tensor | None,  # (U,)
    reduction: str,
    num_items: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss (), and losses (U,) with zeros where not valid.

    A mean is over valid units; num_items, if given, divides instead.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    losses = torch.where(valid, losses, torch.zeros_like(losses))
    total = (losses if weights is None else losses * per_unit("weights", weights, len(losses), losses)).sum()
    if num_items is not None:
        return divided(total, num_items), losses
    return (total if reduction == "sum" else total / valid.sum().clamp(min=1)), losses


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(): mean over the elements of `mask`, 0 where there are none; detached."""
    values = values.detach()
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp(min=1)


def all_reduce(values: Tensor, group) -> Tensor:
    """The sum over the ranks of `group`; None: this rank alone."""
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values
