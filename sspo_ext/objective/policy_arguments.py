# SPDX-License-Identifier: Apache-2.0
"""From a policy loss's public arguments to the checked problem that a route minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from .._checks import check_bool, check_choice, check_not_negative, check_num_items, describe
from ..backends import ops
from ..formulas.policy import KL_ESTIMATORS, LEVELS, PolicyFormula, get_policy_formula
from ..layout.steps import StepLayout
from .idle import idle_rows, units_on_host
from .policy import PolicyProblem, segments_of
from .sums import StepLogps
from .values import copied, number_beside, one_over, step_or_token_values, token_values

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

    def check_threshold(self, has_old: bool) -> None:
        """Raises for a prob_threshold that is out of range or has no old log-probs."""
        threshold = self.prob_threshold
        if threshold is None:
            return
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"prob_threshold: expected a number, got {describe(threshold)}")
        if not 0 < threshold <= 1:
            raise ValueError(f"prob_threshold: expected a number in (0, 1], got {threshold!r}")
        if not has_old:
            raise ValueError("old: expected log-probs for prob_threshold, got None")


def policy_problem(
    layout: StepLayout,
    dtype: torch.dtype,
    backend: str,
    advantages: Tensor,
    old: StepLogps | Tensor | None,
    ref: StepLogps | Tensor | None,
    options: PolicyOptions,
    importance_weights: Tensor | None = None,
) -> PolicyProblem:
    """The checked arguments of one policy loss, for either route."""
    definition = get_policy_formula(options.loss_type)
    values = definition.check_options(options.loss_options)
    options.check(definition, old is not None, ref is not None)
    old_rows, ref_rows = (
        None if value is None else token_values(name, value, layout, dtype)
        for name, value in (("old", old), ("ref", ref))
    )
    options.check_threshold(old is not None)
    advantages = _beside(advantages, layout)
    make = _fused_constants if backends.has_policy_kernels(backend) else _constants
    advantage, scale, norm = make(layout, dtype, backend, advantages, old_rows, options)
    if importance_weights is not None:  # every formula is linear in the advantage, up to a factor that is not negative
        weights = _beside(importance_weights, layout)
        advantage = advantage * token_values("importance_weights", weights, layout, dtype)
    level = options.importance_sampling_level
    return PolicyProblem(
        formula=definition.name,
        options=values,
        kl_estimator=options.kl_estimator,
        kl_coef=float(options.kl_coef),
        entropy_coef=float(options.entropy_coef),
        length_normalize=options.length_normalize,
        advantage=advantage,
        old=old_rows if definition.has_ratio else None,
        ref=ref_rows,
        scale=scale,
        norm=norm,
        segments=None if level == "token" else segments_of(layout, level),
        step_offsets=layout.step_offsets,
        backend=backend,
    )


def _beside(values: Tensor, layout: StepLayout) -> Tensor:
    """Constants on the layout's device; the host does not wait for those that it has."""
    if isinstance(values, Tensor) and values.device.type == "cpu" != layout.device.type:
        return copied(values.detach(), layout.device)
    return values


def without_idle_rows(
    problem: PolicyProblem, layout: StepLayout, advantages: StepLogps | Tensor, level: str, skip: bool
) -> PolicyProblem:
    """The problem with what the host knows of rows that no gradient reaches; `skip`: whether they may be left out."""
    check_bool("skip_zero_advantages", skip)
    advantages = advantages.tokens if isinstance(advantages, StepLogps) else advantages
    if skip and torch.compiler.is_compiling():
        raise ValueError("skip_zero_advantages: expected False under torch.compile, which keeps every row, got True")
    if skip and (advantages.device.type != "cpu" or (advantages.ndim == 2 and layout.device.type != "cpu")):
        raise ValueError(
            "skip_zero_advantages: expected advantages on the host, where products are planned, and for a layout "
            f"elsewhere one a step or a row, got {describe(advantages)}"
        )
    if problem.kl_coef or problem.entropy_coef:  # every row has a gradient
        return problem
    idle = idle_rows(advantages, layout, units_on_host(layout, level))
    if idle is None:
        return problem
    return replace(problem, idle=idle, skipped=copied(torch.from_numpy(idle), layout.device) if skip else None)


def _constants(
    layout: StepLayout, dtype: torch.dtype, backend: str, advantages: Tensor, old: Tensor | None, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantage (N,), scale (N,) and norm () of a PolicyProblem."""
    device, aggregation, num_items = layout.device, options.aggregation, options.num_items
    advantage = token_values("advantages", advantages, layout, dtype, steps=True)
    counted = None
    if options.prob_threshold is not None:
        assert old is not None
        counted = torch.exp(old) < options.prob_threshold
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
        return advantage, scale, torch.ones((), dtype=dtype, device=device)
    return advantage, scale, one_over(items, dtype, device)


def _fused_constants(
    layout: StepLayout, dtype: torch.dtype, backend: str, advantages: Tensor, old: Tensor | None, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one launch; values (B, T) are gathered before."""
    aggregation, items, norm = options.aggregation, None, 1.0
    values, of_steps = step_or_token_values("advantages", advantages, layout, dtype, True)
    if options.num_items is not None:
        check_num_items(options.num_items)
        given = number_beside(options.num_items, layout.device)
        items = given.to(layout.device) if isinstance(given, Tensor) else None
        norm = norm if isinstance(given, Tensor) else (1.0 / given if given else 0.0)
    offsets = {"step": layout.step_offsets, "sequence": layout.sequence_offsets}.get(aggregation)
    threshold = options.prob_threshold
    counts = options.num_items is None and aggregation != "sum"
    made, scale, norm = ops.policy_constants(
        values if of_steps else None, layout.step_of_row, layout.weights, None if threshold is None else old, offsets,
        items, counts, threshold or 0.0, norm, backend,
    )  # fmt: skip
    return made if of_steps else values, scale, norm


def _as_tensor(num_items: float, device: torch.device) -> Tensor:
    check_num_items(num_items)
    return torch.full((), float(num_items), dtype=torch.float64, device=device)
