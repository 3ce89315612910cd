# SPDX-License-Identifier: Apache-2.0
"""The checked arguments of every call of the logits route: logits, layout, logit map, backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import backends
from ..._checks import check_bool, check_float, check_tensor
from ...backends.addresses import accumulator
from ...layout.steps import StepLayout
from ..kept import check_kept, narrowed
from ..shared import logit_map


def layout_of(
    logits: Tensor, layout, labels: Tensor | None, step_ids: Tensor | None, token_weights: Tensor | None = None
) -> StepLayout:
    """The StepLayout that was given, or one built from plain labels and step ids."""
    if isinstance(layout, StepLayout):
        if labels is not None or step_ids is not None:
            raise TypeError("labels, step_ids: given beside a StepLayout, which holds them already")
        return layout if token_weights is None else layout.with_row_weights(token_weights)
    if layout is not None and labels is not None:
        raise TypeError("labels: given twice, by position and by name")
    labels = check_tensor("labels", labels if layout is None else layout, ndim=2)
    if step_ids is None:
        raise TypeError("step_ids: expected (B, T) step ids beside plain labels, got None; or pass a StepLayout")
    check_tensor("logits", logits, ndim=3)
    built = StepLayout.from_step_ids(labels, step_ids, token_weights=token_weights, vocab_size=logits.shape[-1])
    return built.to(logits.device)


@dataclass(frozen=True, eq=False)
class LogitsCall:
    """The checked arguments of one call; every function of the route starts from them."""

    logits: Tensor  # (B, T, V), last dimension contiguous
    layout: StepLayout
    a: float  # the logit map, see `shared.logit_map`
    c: float
    requested: str  # the backend that was asked for
    backend: str  # the one that runs
    inplace_backward: bool

    @property
    def acc_dtype(self) -> torch.dtype:
        return accumulator(self.logits.dtype)


def prepare(
    logits: Tensor, layout: StepLayout, temperature: float, logit_softcap: float | None, logit_scale: float,
    backend: str, inplace_backward: bool,
) -> LogitsCall:  # fmt: skip
    """Checks the arguments that every function of the logits route takes."""
    check_float("logits", logits)
    check_bool("inplace_backward", inplace_backward)
    if logits.device != layout.device:
        raise ValueError(
            f"layout: expected it on {logits.device}, where logits is (layout.to(...)), got {layout.device}"
        )
    a, c = logit_map(temperature, logit_softcap, logit_scale)
    name = backends.select(backend, logits.device.type, logits.dtype)
    if inplace_backward and name == "reference":
        raise ValueError(no_inplace(logits, "no other runs here"))
    if inplace_backward and _may_overlap(logits):
        raise ValueError(
            f"inplace_backward: expected logits whose elements do not share memory, got strides {logits.stride()}"
        )
    check_kept(layout, logit_softcap, None)
    logits = narrowed(layout.check_logits(logits), layout.rows, layout.kept)
    return LogitsCall(logits, layout, a, c, backend, name, inplace_backward)


def no_inplace(logits: Tensor, others: str) -> str:
    """The message for inplace_backward where the reference runs."""
    reasons = backends.reasons(logits.device, logits.dtype)
    return f"inplace_backward: the reference backend cannot write over the logits, and {others} ({reasons})"


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory.

    False where each stride exceeds the reach of all smaller ones together, as in every view of a contiguous tensor that
    names no element twice.
    """
    dims = [(n - 1, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    reach = [sum(m * s for j, (m, s) in enumerate(dims) if j != i and s <= dims[i][1]) for i in range(len(dims))]
    return x.numel() > 0 and any(stride <= far for (_, stride), far in zip(dims, reach, strict=True))
