# SPDX-License-Identifier: Apache-2.0
"""Constants of a loss in every form that callers may pass, and what a sum is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_device, check_float, check_num_items, check_shape, describe
from ..layout.steps import StepLayout
from .sums import StepLogps, sums_over_steps


def copied(values: Tensor, device: torch.device) -> Tensor:
    """A copy of host values on the device, for which the host does not wait."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def one_over(items: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(): 1 / items, or 0 when there is nothing to divide by. The host does not wait for a tensor."""
    check_num_items(items)
    items = number_beside(items, device)
    if not isinstance(items, Tensor):
        return torch.full((), 1.0 / items if items else 0.0, dtype=dtype, device=device)
    items = items.to(device, dtype)
    return torch.where(items > 0, items.reciprocal(), torch.zeros_like(items))


def number_beside(items: float | Tensor, device: torch.device) -> float | Tensor:
    """A number for a CPU tensor beside tensors elsewhere: the host would wait for the device to copy so little."""
    if not isinstance(items, Tensor) or torch.compiler.is_compiling():
        return items
    return items.item() if items.device.type == "cpu" != device.type else items


def divided(total: Tensor, items: float | Tensor) -> Tensor:
    """(): total / items, or 0 when there is nothing to divide by; differentiable in `total`."""
    check_num_items(items)
    items = number_beside(items, total.device)
    if not isinstance(items, Tensor):
        return total / items if items else 0 * total
    items = items.to(total.device, total.dtype)
    return torch.where(items > 0, total / items.clamp(min=torch.finfo(items.dtype).tiny), 0 * total)


def aligned_rows(name: str, value: Tensor, layout: StepLayout, others: tuple[int, ...]) -> Tensor | None:
    """(N,) in row order from (B, T) values aligned with the labels, or (total,) of a packed batch.

    None for another form; `others` are the lengths of 1-D values of other forms.
    """
    packed = value.ndim == 1 and layout.shape == (1, value.shape[0]) and value.shape[0] not in others
    if value.ndim != 2 and not packed:
        return None
    check_shape(name, value if value.ndim == 2 else value[None], layout.shape)
    return value.reshape(-1)[layout.places]


def reference_sums(ref: StepLogps | Tensor | None, layout: StepLayout) -> Tensor | None:
    """(S,) step sums of the reference, detached."""
    if ref is None:
        return None
    if isinstance(ref, StepLogps):
        # from the tokens, so that the reference gets this loss's token weights
        check_shape("ref.tokens", ref.tokens, (layout.num_rows,))
        return sums_over_steps(ref.tokens.detach().to(layout.device), layout)
    check_float("ref", ref)
    check_device("ref", ref, layout.device, "the layout")
    ref, (rows, steps) = ref.detach(), (layout.num_rows, layout.num_steps)
    aligned = aligned_rows("ref", ref, layout, (rows, steps))
    if aligned is not None:
        return sums_over_steps(aligned, layout)
    if ref.shape == (rows,) == (steps,) and (layout.weights is not None or not layout.one_row_per_step):
        raise ValueError(
            f"ref: {describe(ref)} may be step sums or token log-probs here; pass a StepLogps or (B, T) token log-probs"
        )
    if ref.shape == (steps,):
        return ref
    if ref.shape == (rows,):
        return sums_over_steps(ref, layout)
    raise ValueError(
        f"ref: expected step sums ({steps},), token log-probs ({rows},) or {layout.shape}, or a StepLogps, "
        f"got {describe(ref)}"
    )


def reference_tokens(ref: StepLogps | Tensor, layout: StepLayout, needed_by: str) -> Tensor:
    """(N,) token log-probs of the reference."""
    if isinstance(ref, StepLogps):
        tokens = ref.tokens
    else:
        check_float("ref", ref)
        tokens = ref.reshape(-1)[layout.places] if tuple(ref.shape) == layout.shape else ref
    if tuple(tokens.shape) != (layout.num_rows,):
        raise ValueError(
            f"ref: {needed_by} needs token log-probs, a StepLogps, ({layout.num_rows},) or {layout.shape}, got "
            f"{describe(ref)}"
        )
    return tokens


def token_values(
    name: str, value: StepLogps | Tensor, layout: StepLayout, dtype: torch.dtype, *, steps: bool = False
) -> Tensor:
    """(N,) constants in row order; with `steps` one value a step is allowed too."""
    values, of_steps = step_or_token_values(name, value, layout, dtype, steps)
    return values[layout.step_of_row] if of_steps else values


def step_or_token_values(
    name: str, value: StepLogps | Tensor, layout: StepLayout, dtype: torch.dtype, steps: bool
) -> tuple[Tensor, bool]:
    """((N,) constants in row order, False), or ((S,) one a step, True) where `steps` allows that."""
    rows, num_steps = layout.num_rows, layout.num_steps
    if isinstance(value, StepLogps):
        name, value = f"{name}.tokens", value.tokens
    check_float(name, value, ndim=(1, 2))
    check_device(name, value, layout.device, "the layout")
    value = value.detach().to(dtype)
    aligned = aligned_rows(name, value, layout, (rows, num_steps) if steps else (rows,))
    if aligned is not None:
        return aligned, False
    if steps and rows == num_steps == value.shape[0] and not layout.one_row_per_step:
        raise ValueError(f"{name}: {describe(value)} may be steps' or tokens' here; pass (B, T) values of the tokens")
    if steps and value.shape[0] == num_steps:
        return value.contiguous(), True
    if value.shape[0] == rows:
        return value.contiguous(), False
    forms = f"({num_steps},) a step, " if steps else ""
    raise ValueError(f"{name}: expected {forms}({rows},) rows or {layout.shape} tokens, got {describe(value)}")
