# SPDX-License-Identifier: Apache-2.0
"""From a pair loss's public arguments to what its launches need: pairs, terms, normaliser, the reference's sums.

Both routes use it. Every wrong argument is found here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._checks import check_bool, check_choice, check_device, check_kind, check_number, check_shape, describe
from ..formulas.registry import PairFormula, get_pair_formula
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from .pair import LossTerm, PairLossSpec
from .sums import StepLogps
from .values import one_over, reference_sums


def chosen_formulas(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None
) -> list[tuple[PairFormula, float]]:
    """The formulas of a loss, with their weights; one name gives a list of one."""
    if isinstance(loss_type, str):
        if loss_weights is not None:
            raise ValueError(f"loss_weights: expected None beside one loss_type, got {describe(loss_weights)}")
        return [(get_pair_formula(loss_type), 1.0)]
    if not isinstance(loss_type, (list, tuple)) or not loss_type or not all(isinstance(n, str) for n in loss_type):
        raise TypeError(f"loss_type: expected a name or a list of names, got {describe(loss_type)}")
    if len(set(loss_type)) < len(loss_type):
        raise ValueError(f"loss_type: expected every name once, got {describe(loss_type)}")
    weights = [1.0] * len(loss_type) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_type):
        raise ValueError(f"loss_weights: expected {len(loss_type)} numbers, as many as loss_type, got {len(weights)}")
    for weight in weights:
        check_number("loss_weights", weight)
    return [(get_pair_formula(name), float(weight)) for name, weight in zip(loss_type, weights, strict=True)]


def resolve_pairs(
    layout: StepLayout,
    pairs: StepPairs | Tensor | None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    soft_labels: Tensor | None = None,
) -> StepPairs:
    """StepPairs from StepPairs, an index (P, 2) or None; constants given beside a StepPairs replace its own."""
    per_pair = {"weights": weights, "margins": margins, "soft_labels": soft_labels}
    if pairs is None:
        pairs = layout.pair_by_index()
    elif not isinstance(pairs, StepPairs):
        pairs = StepPairs.from_index(layout, pairs)
    if pairs.num_steps != layout.num_steps:
        raise ValueError(
            f"pairs: expected pairs of the layout's {layout.num_steps} steps, got pairs made for {pairs.num_steps}"
        )
    own = pairs.host_step_offsets is layout.host_step_offsets or torch.compiler.is_compiling()
    if not own and not torch.equal(pairs.host_step_offsets, layout.host_step_offsets):
        raise ValueError("pairs: expected pairs made for this layout, got pairs of one whose steps have other lengths")
    if pairs.index.device != layout.device:
        raise ValueError(f"pairs: expected them on {layout.device} (pairs.to(...)), got {pairs.index.device}")
    return pairs.with_values(**per_pair) if any(v is not None for v in per_pair.values()) else pairs


def pair_loss_spec(
    formulas: Sequence[tuple[PairFormula, float]],
    layout: StepLayout,
    pairs: StepPairs,
    dtype: torch.dtype,
    ref: StepLogps | Tensor | None,
    beta: float | None,
    label_smoothing: float,
    reduction: str,
    num_items: float | Tensor | None,
    loss_options: Mapping[str, float],
    reference_free: bool = False,
) -> PairLossSpec:
    """The checked arguments of one call.

    Each of several formulas takes the options that it has; an option that none has raises.
    """
    names = [definition.name for definition, _ in formulas]
    options = checked_options(formulas, beta, loss_options)
    label = checked_label(formulas, names, label_smoothing, pairs.soft_labels is not None)
    if pairs.margins is not None and not any(definition.margins for definition, _ in formulas):
        raise ValueError(f"margins: loss_type {_named(names)} does not have them")
    if ref is not None and all(definition.reference == "forbidden" for definition, _ in formulas):
        raise ValueError(f"ref: loss_type {_named(names)} is reference-free, got {describe(ref)}")
    needing = [definition.name for definition, _ in formulas if definition.reference == "required"]
    if ref is None and needing:
        raise ValueError(f"ref: loss_type {needing[0]!r} needs a reference, got None")
    taking = [f"loss_type {d.name!r}" for d, _ in formulas if d.reference == "optional"]
    check_reference_free(ref, reference_free, taking, stacklevel=5)
    terms = tuple(
        LossTerm(
            definition.name,
            tuple(values),
            label,
            weight,
            ref=definition.reference != "forbidden",
            margins=definition.margins,
            soft_labels=definition.soft_labels,
            by_winner_tokens=definition.by_winner_tokens,
        )
        for (definition, weight), values in zip(formulas, options, strict=True)
    )
    share = _winner_token_share(layout, pairs, dtype) if any(t.by_winner_tokens for t in terms) else None
    return PairLossSpec(pairs, terms, _scale(pairs, reduction, num_items, dtype), reference_sums(ref, layout), share)


def check_reference_free(ref, reference_free: bool, taking: Sequence[str], *, stacklevel: int) -> None:
    """A forgotten reference gives another loss and no error, so leaving it out must be said.

    Args:
        ref: the reference, or None.
        reference_free: whether none is meant.
        taking: the losses that take one.
        stacklevel: of the warning: 3 is the caller's caller.
    """
    check_bool("reference_free", reference_free)
    if reference_free and ref is not None:
        raise ValueError(f"reference_free: expected False beside a ref, got ref {describe(ref)}")
    if ref is None and taking and not reference_free and not torch.compiler.is_compiling():
        _warn_reference_free(taking[0], stacklevel)


@functools.cache
def _warn_reference_free(name: str, stacklevel: int) -> None:
    warnings.warn(
        f"ref: {name} takes a reference and got None, so a reward is beta * log pi; pass the reference's "
        "log-probs, or reference_free=True if that is meant (said once)",
        stacklevel=stacklevel,
    )


def _named(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(list(names))


def checked_options(
    formulas: Sequence[tuple[PairFormula, float]], beta: float | None, given: Mapping[str, float]
) -> list[list[float]]:
    """Each formula's option values, in its order."""
    known = {name for definition, _ in formulas for name in definition.options}
    unknown = sorted(set(given) - known)
    if len(formulas) > 1 and unknown:
        raise TypeError(
            f"{unknown[0]}: neither a common option nor one of loss_type {[h.name for h, _ in formulas]!r} "
            f"(which have {', '.join(sorted(known))})"
        )
    return [
        definition.check_options(
            definition.options["beta"] if beta is None else beta,
            given if len(formulas) == 1 else {k: v for k, v in given.items() if k in definition.options},
        )
        for definition, _ in formulas
    ]


def check_logps(name: str, logps: StepLogps, layout: StepLayout) -> None:
    """TypeError or ValueError unless `logps` are step log-probs of this layout."""
    check_kind("layout", layout, StepLayout, "a StepLayout")
    if not isinstance(logps, StepLogps):
        raise TypeError(f"{name}: expected a StepLogps (of step_logps or linear_step_logps), got {describe(logps)}")
    check_shape(f"{name}.sums", logps.sums, (layout.num_steps,))
    check_shape(f"{name}.tokens", logps.tokens, (layout.num_rows,))
    check_device(f"{name}.sums", logps.sums, layout.device, "the layout")


def checked_logps(logps: StepLogps | Tensor, layout: StepLayout) -> StepLogps:
    """Step log-probs of this layout, from themselves or from token log-probs."""
    if isinstance(logps, Tensor):
        return StepLogps.from_tokens(logps, layout)
    check_logps("logps", logps, layout)
    return logps


def check_smoothing(label_smoothing: float) -> None:
    """ValueError unless it is in [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")


def checked_label(
    formulas: Sequence[tuple[PairFormula, float]], names: Sequence[str], label_smoothing: float, soft_labels: bool
) -> float:
    """1 - label_smoothing, the share of pairs in the right order; ValueError for an option that no loss has."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a number, got {describe(label_smoothing)}")
    check_smoothing(label_smoothing)
    if label_smoothing and all(definition.smoothing == "none" for definition, _ in formulas):
        raise ValueError(f"label_smoothing: loss_type {_named(names)} does not have it")
    if soft_labels and not any(definition.soft_labels for definition, _ in formulas):
        raise ValueError(f"soft_labels: loss_type {_named(names)} does not have it")
    if label_smoothing and soft_labels:
        raise ValueError("label_smoothing: expected 0 when soft_labels are given, since they replace it")
    for definition, _ in formulas:
        if definition.smoothing == "required" and not label_smoothing and not soft_labels:
            raise ValueError(
                f"label_smoothing: loss_type {definition.name!r} needs a number above 0 (1e-3), or soft_labels"
            )
    return 1.0 - label_smoothing


def _winner_token_share(layout: StepLayout, pairs: StepPairs, dtype: torch.dtype) -> Tensor:
    """(P,): n_w over its mean over valid pairs, which turns a mean over pairs into one over winners' tokens."""
    tokens = layout.counts[pairs.index[:, 0].long()].to(dtype) * pairs.valid
    return tokens * (pairs.valid.sum() / tokens.sum().clamp(min=1))


def _scale(pairs: StepPairs, reduction: str, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """(): the factor on the sum over pairs; 0 when there is nothing to divide by."""
    check_choice("reduction", reduction, ("mean", "sum"))
    device = pairs.index.device
    if num_items is not None:
        return one_over(num_items, dtype, device)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=device)
    if dtype == torch.float32:
        return pairs.mean_scale
    return one_over(max(pairs.num_valid, 1), dtype, device)
