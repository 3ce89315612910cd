# SPDX-License-Identifier: Apache-2.0
"""What both routes share: the logit map, the scaling of kept gradients, and the coefficients of a row's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._checks import check_positive

_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-32, 1e32  # times log2(e) and a logit, float32 has room on both sides
_BLOCK_ELEMENTS = 1 << 18  # float32 temporaries of 1 MiB fit a core's cache and are small beside the gradients


def refuse_double_backward() -> None:
    """Raises inside a backward that autograd records.

    `once_differentiable` raises only if the incoming gradient requires grad. A loss's does not, so a second derivative
    would be silently wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sspo_ext: create_graph=True asks for a second derivative, and step losses and log-probabilities have only "
            "a first; backend='reference' is differentiable as often as wanted"
        )


def scale_kept(kept: Tensor, scale: Tensor, backend: str) -> Tensor:
    """The gradient kept from forward, (R, C), times a scale () or (R, 1), in float32 and rounded once.

    It overwrites `kept`, unless the graph is kept for another backward, so that no second copy exists. A row whose
    scale is 0 becomes zeros, whatever it held. With Triton it is one launch.
    """
    if torch.compiler.is_compiling():
        # a 0-dim scale does not widen the product by itself
        product = kept.to(torch.promote_types(kept.dtype, scale.dtype)) * scale
        return torch.where(scale == 0, 0.0, product).to(kept.dtype)
    if scale.ndim == 0 and scale.device.type == "cpu" and scale.item() == 1:
        # reading host memory is no sync, and the usual upstream gradient of 1 then costs nothing
        return kept.clone() if _graph_is_kept() else kept
    out = torch.empty_like(kept) if _graph_is_kept() else kept
    if kept.device.type == "cpu" and backend != "triton":
        _scale_in_blocks(kept, scale, out)
        return out
    scale = scale.to(kept.device)
    scale_rows = getattr(backends.load(backend), "scale_rows", None)
    if scale_rows is not None and kept.dtype != torch.float64:
        scale_rows(kept, scale.expand(kept.shape[0]) if scale.ndim == 0 else scale[:, 0], out)
        return out
    factor = scale.expand(1, 1) if scale.ndim == 0 else scale  # a 0-dim one would be rounded to the dtype of `kept`
    return torch.mul(kept, factor, out=out).masked_fill_(factor == 0, 0.0)


def _scale_in_blocks(kept: Tensor, scale: Tensor, out: Tensor) -> None:
    """The product in torch, in blocks whose float32 temporaries fit a core's cache."""
    block = max(1, _BLOCK_ELEMENTS // max(1, kept[:1].numel()))
    for start in range(0, kept.shape[0], block):
        rows = slice(start, start + block)
        factor = scale[rows] if scale.ndim else scale
        product = kept[rows].to(torch.promote_types(kept.dtype, scale.dtype)) * factor
        out[rows] = product.masked_fill_(factor == 0, 0.0)


def _graph_is_kept() -> bool:
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]  # torch's stubs leave it out
    known = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return True if known is None else known()


def logit_map(temperature: float, logit_softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """(a, c) such that z = a * x, or c * tanh(a * x) with a softcap, is the logit of the sampled distribution.

    The order is the models': scale, then softcap, then temperature.

    Raises:
        ValueError: an argument is not a finite number above 0, or a or c is too large or small for float32 kernels.
        TypeError: an argument is not a number.
    """
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if logit_softcap is None:
        return _factor("logit_scale / temperature", logit_scale, temperature), 0.0
    check_positive("logit_softcap", logit_softcap)
    a = _factor("logit_scale / logit_softcap", logit_scale, logit_softcap)
    return a, _factor("logit_softcap / temperature", logit_softcap, temperature)


def _factor(name: str, above: float, below: float) -> float:
    """The quotient, if kernels can hold it."""
    quotient = above / below
    if not _SMALLEST_FACTOR <= quotient <= _LARGEST_FACTOR:
        raise ValueError(
            f"{name}: expected a number from {_SMALLEST_FACTOR:g} to {_LARGEST_FACTOR:g}, since kernels hold it in "
            f"float32, got {quotient:g}"
        )
    return quotient


def gradient_coefs(
    entropy: Tensor,  # (N,), as are the others; not read where no gradient arrives at it
    sum_p2: Tensor | None,
    d_tokens: Tensor | None,
    d_entropy: Tensor | None,
    d_sum_p2: Tensor | None,
    d_kl: Tensor | None,
) -> Tensor:  # (N, 5) of entropy's dtype
    """The five numbers of each row's gradient, g, constant, log_p, square and kappa, as in `logits/reductions.py`.

    They come from the gradients that arrive at the row's log-prob, entropy, sum of squares and KL.
    """
    given = next(d for d in (d_tokens, d_entropy, d_sum_p2, d_kl) if d is not None)
    zeros = torch.zeros_like(given, dtype=entropy.dtype)
    g, d_H, d_s, d_kl_ = (zeros if d is None else d.to(zeros.dtype) for d in (d_tokens, d_entropy, d_sum_p2, d_kl))
    constant = d_kl_ if d_entropy is None else d_kl_ - d_H * entropy
    if d_sum_p2 is not None:
        assert sum_p2 is not None
        constant = constant - 2 * d_s * sum_p2
    return torch.stack([g, constant, -d_H, 2 * d_s, d_kl_], dim=1)
