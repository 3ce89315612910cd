# SPDX-License-Identifier: Apache-2.0
"""From a policy loss's public arguments to the checked problem that a route minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_bool, check_choice, check_not_negative, check_num_items, describe
from ..formulas.policy import KL_ESTIMATORS, LEVELS, PolicyFormula, get_policy_formula
from ..layout.steps import StepLayout
from .policy import PolicyProblem, segments_of
from .sums import StepLogps
from .values import one_over, token_values

AGGREGATIONS = ("token", "step", "sequence", "sum")


@dataclass(frozen=True)
class PolicyOptions:
    """The options of a policy loss, as `step_policy_loss` documents them."""

    loss_type: str
    importance_sampling_level: str
    length_normalize: bool
    prob_threshold: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    aggregation: str
    num_items: float | Tensor | None
    loss_options: Mapping[str, float | None]

    def check(self, definition: PolicyFormula, has_old: bool, has_ref: bool) -> None:
        """Raises for an option that is out of range or that the loss does not have."""
        level, loss_type = self.importance_sampling_level, self.loss_type
        check_choice("importance_sampling_level", level, LEVELS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("kl_estimator", self.kl_estimator, tuple(KL_ESTIMATORS))
        check_not_negative("kl_coef", self.kl_coef)
        check_not_negative("entropy_coef", self.entropy_coef)
        check_bool("length_normalize", self.length_normalize)
        if not definition.has_ratio and level != "token":
            raise ValueError(f"importance_sampling_level: loss_type {loss_type!r} has no ratio, got {level!r}")
        if not self.length_normalize and level == "token":
            raise ValueError("length_normalize: expected True where each token has its own ratio, got False")
        if not definition.has_ratio and self.prob_threshold is None and has_old:
            raise ValueError(f"old: loss_type {loss_type!r} has no ratio and needs none without prob_threshold")
        if self.kl_coef and not has_ref:
            raise ValueError(f"ref: expected log-probs for the KL term (kl_coef={self.kl_coef!r}), got None")

    def counted(self, old: Tensor | None) -> Tensor | None:
        """(N,) bool: the tokens below prob_threshold; None without one."""
        threshold = self.prob_threshold
        if threshold is None:
            return None
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"prob_threshold: expected a number, got {describe(threshold)}")
        if not 0 < threshold <= 1:
            raise ValueError(f"prob_threshold: expected a number in (0, 1], got {threshold!r}")
        if old is None:
            raise ValueError("old: expected log-probs for prob_threshold, got None")
        return torch.exp(old) < threshold


def policy_problem(
    layout: StepLayout,
    dtype: torch.dtype,
    backend: str,
    advantages: Tensor,
    old: StepLogps | Tensor | None,
    ref: StepLogps | Tensor | None,
    options: PolicyOptions,
) -> PolicyProblem:
    """The checked arguments of one policy loss, for either route."""
    definition = get_policy_formula(options.loss_type)
    values = definition.check_options(options.loss_options)
    options.check(definition, old is not None, ref is not None)
    old_rows, ref_rows = (
        None if value is None else token_values(name, value, layout, dtype)
        for name, value in (("old", old), ("ref", ref))
    )
    counted = options.counted(old_rows)
    scale, norm = _scale(layout, counted, options.aggregation, options.num_items, dtype)
    level = options.importance_sampling_level
    return PolicyProblem(
        formula=definition.name,
        options=values,
        kl_estimator=options.kl_estimator,
        kl_coef=float(options.kl_coef),
        entropy_coef=float(options.entropy_coef),
        length_normalize=options.length_normalize,
        advantage=token_values("advantages", advantages, layout, dtype, steps=True),
        old=old_rows if definition.has_ratio else None,
        ref=ref_rows,
        scale=scale,
        norm=norm,
        segments=None if level == "token" else segments_of(layout, level),
        step_offsets=layout.step_offsets,
        backend=backend,
    )


def _scale(
    layout: StepLayout, counted: Tensor | None, aggregation: str, num_items: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale (N,) and norm () of a PolicyProblem."""
    device = layout.device
    scale = torch.ones(layout.num_rows, dtype=dtype, device=device)
    if layout.weights is not None:
        scale = layout.weights.to(dtype)
    ones = torch.ones_like(layout.step_of_row) if counted is None else counted.long()
    if counted is not None:
        scale = torch.where(counted, scale, 0.0)
    items: Tensor | None = None
    if aggregation == "token":
        items = ones.sum()
    elif aggregation != "sum":
        of_row, number = layout.step_of_row, layout.num_steps
        if aggregation == "sequence":
            of_row, number = layout.step_sequence.long()[of_row], layout.num_sequences
        # the order of the sum does not matter, because these are integers
        tokens = torch.zeros(number, dtype=torch.int64, device=device).index_add(0, of_row, ones)
        scale = scale / tokens.clamp(min=1)[of_row].to(dtype)
        items = (tokens > 0).sum()
    if num_items is not None:
        items = num_items if isinstance(num_items, Tensor) else _as_tensor(num_items, device)
    if items is None:
        return scale, torch.ones((), dtype=dtype, device=device)
    return scale, one_over(items, dtype, device)


def _as_tensor(num_items: float, device: torch.device) -> Tensor:
    check_num_items(num_items)
    return torch.full((), float(num_items), dtype=torch.float64, device=device)
