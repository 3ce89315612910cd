"""From a policy loss's public arguments to the checked problem that a route minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_device,
    check_float,
    check_not_negative,
    check_num_items,
    check_shape,
    describe,
)
from ..formulas.policy import KL_ESTIMATORS, LEVELS, get_policy_formula
from ..layout.steps import StepLayout
from .policy import PolicyProblem, segments_of
from .sums import StepLogps

AGGREGATIONS = ("token", "step", "sequence", "sum")


def policy_problem(
    layout: StepLayout, dtype: torch.dtype, backend: str, advantages, old, ref, loss_type, level, length_normalize,
    prob_threshold, kl_coef, kl_estimator, entropy_coef, aggregation, num_items, loss_options,
) -> PolicyProblem:  # fmt: skip
    """Validated arguments of one policy loss, shared by the routes."""
    definition = get_policy_formula(loss_type)
    options = definition.check_options(loss_options)
    check_choice("importance_sampling_level", level, LEVELS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("kl_estimator", kl_estimator, tuple(KL_ESTIMATORS))
    check_not_negative("kl_coef", kl_coef)
    check_not_negative("entropy_coef", entropy_coef)
    if not isinstance(length_normalize, bool):
        raise TypeError(f"length_normalize: expected True or False, got {describe(length_normalize)}")
    if not definition.has_ratio and level != "token":
        raise ValueError(f"importance_sampling_level: loss_type {loss_type!r} has no ratio, got {level!r}")
    if not length_normalize and level == "token":
        raise ValueError("length_normalize: expected True where each token has its own ratio, got False")
    if not definition.has_ratio and prob_threshold is None and old is not None:
        raise ValueError(f"old: loss_type {loss_type!r} has no ratio and needs none without prob_threshold")
    if kl_coef and ref is None:
        raise ValueError(f"ref: expected log-probs for the KL term (kl_coef={kl_coef!r}), got None")
    old, ref = (
        None if value is None else _token_values(name, value, layout, dtype)
        for name, value in (("old", old), ("ref", ref))
    )
    counts = None
    if prob_threshold is not None:
        if isinstance(prob_threshold, bool) or not isinstance(prob_threshold, (int, float)):
            raise TypeError(f"prob_threshold: expected a number, got {describe(prob_threshold)}")
        if not 0 < prob_threshold <= 1:
            raise ValueError(f"prob_threshold: expected a number in (0, 1], got {prob_threshold!r}")
        if old is None:
            raise ValueError("old: expected log-probs for prob_threshold, got None")
        counts = torch.exp(old) < prob_threshold
    scale, norm = _scale(layout, counts, aggregation, num_items, dtype)
    return PolicyProblem(
        formula=definition.name,
        options=options,
        kl_estimator=kl_estimator,
        kl_coef=float(kl_coef),
        entropy_coef=float(entropy_coef),
        length_normalize=length_normalize,
        advantage=_token_values("advantages", advantages, layout, dtype, steps=True),
        old=old if definition.has_ratio else None,
        ref=ref,
        scale=scale,
        norm=norm,
        segments=None if level == "token" else segments_of(layout, level),
        step_offsets=layout.step_offsets,
        backend=backend,
    )


def _scale(
    layout: StepLayout, counts: Tensor | None, aggregation: str, num_items: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(N,) weight of each token within what is averaged first, and () one over the number of what is averaged last."""
    device = layout.device
    scale = torch.ones(layout.num_rows, dtype=dtype, device=device)
    if layout.weights is not None:
        scale = layout.weights.to(dtype)
    ones = torch.ones_like(layout.step_of_row) if counts is None else counts.long()
    if counts is not None:
        scale = torch.where(counts, scale, 0.0)
    items = None
    if aggregation == "token":
        items = ones.sum()
    elif aggregation != "sum":
        of_row, number = layout.step_of_row, layout.num_steps
        if aggregation == "sequence":
            of_row, number = layout.step_sequence.long()[of_row], layout.num_sequences
        # integers: their sum has no order
        tokens = torch.zeros(number, dtype=torch.int64, device=device).index_add(0, of_row, ones)
        scale = scale / tokens.clamp(min=1)[of_row].to(dtype)
        items = (tokens > 0).sum()
    if num_items is not None:
        check_num_items(num_items)
    if isinstance(num_items, Tensor):
        items = num_items.to(device)
    elif num_items is not None:
        items = torch.full((), float(num_items), dtype=torch.float64, device=device)
    if items is None:
        return scale, torch.ones((), dtype=dtype, device=device)
    items = items.to(dtype)
    return scale, torch.where(items > 0, items.reciprocal(), 0.0)


def _token_values(name: str, value, layout: StepLayout, dtype: torch.dtype, steps: bool = False) -> Tensor:
    """(N,) constants in row order from whatever form they came in; with `steps`, also from one value a step."""
    rows, num_steps = layout.num_rows, layout.num_steps
    if isinstance(value, StepLogps):
        name, value = f"{name}.tokens", value.tokens
    check_float(name, value, ndim=(1, 2))
    check_device(name, value, layout.device, "the layout")
    value = value.detach().to(dtype)
    known = ((rows,), (num_steps,)) if steps else ((rows,),)
    if value.ndim == 2 or (tuple(value.shape) not in known and layout.shape == (1, value.shape[0])):
        check_shape(name, value if value.ndim == 2 else value[None], layout.shape)
        return value.reshape(-1)[layout.rows + 1]
    if steps and rows == num_steps == value.shape[0] and not layout.one_row_per_step:
        raise ValueError(f"{name}: {describe(value)} may be steps' or tokens' here; pass (B, T) values of the tokens")
    if steps and value.shape[0] == num_steps:
        return value[layout.step_of_row]
    if value.shape[0] == rows:
        return value.contiguous()
    forms = f"({num_steps},) a step, " if steps else ""
    raise ValueError(f"{name}: expected {forms}({rows},) rows or {layout.shape} tokens, got {describe(value)}")
