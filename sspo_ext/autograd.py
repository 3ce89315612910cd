"""What the autograd.Functions of the routes share."""

from __future__ import annotations

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """Identity on a gradient, tied to the inputs it is a gradient of, so that differentiating through it meets an error."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "sspo_ext: step losses and log-probabilities are differentiable once, and this is a second backward through their gradient; "
            "backend='reference' is differentiable twice"
        )


def once(gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that refuse a second derivative. `once_differentiable` refuses only when the gradient coming in has a graph, which
    that of a loss has not: under create_graph=True the result would be taken for a constant, silently."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return tuple(None if g is None else _Once.apply(g.detach(), *inputs) for g in gradients)
