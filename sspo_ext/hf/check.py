# SPDX-License-Identifier: Apache-2.0
"""The start-up check of an LM head: do its weight, scale and softcap give the model's own logits?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forward import logits_of, run_with_head
from .head import LMHead, model_head
from .whole_head import with_head
from .wrappers import eval_mode, find_head, unsupported

# Factors of the activations: from 1, as they are, to far above any softcap.
_GAINS = (1.0, 8.0, 64.0, 512.0, 4096.0, 32768.0)


def check_head(model: nn.Module, sample_inputs: dict[str, Any]) -> LMHead:
    """Check once, at the start, that `model_head` describes the model's logits.

    The model runs once, in eval mode and without gradient, so no random number is drawn. Its head reads the first
    position at several magnitudes, and the model's logits are compared with those of `model_head`.

    This finds a scale or softcap that the config does not declare or the class does not apply, a vocabulary that is
    cut, and a head that is more than a matrix. It does not see what a model does to the logits of later positions only.

    Args:
        model: the outermost module, as for `forward_hidden`. Its modes are restored.
        sample_inputs: the model's keyword arguments, on its device. One short row is enough.

    Returns:
        The checked head.

    Raises:
        UnsupportedHead: if the logits differ (the message names the model's class and the largest difference), or if
            `model_head` or `forward_hidden` raises it.
        TypeError: as `forward_hidden`.

    Examples:
        >>> head = check_head(model, {"input_ids": input_ids[:1]})
        >>> head.logit_scale, head.logit_softcap
        (1.0, None)
    """
    compare_head(model, sample_inputs)
    # Taken again: a weight that PEFT computes (trainable_token_indices) has no gradient when it is taken under no_grad.
    return model_head(model)


def compare_head(model: nn.Module, sample_inputs: dict[str, Any]) -> None:
    """The comparison of `check_head`, also of a head that ZeRO-3 has whole inside its own call only."""
    inner, _ = find_head(model)

    def compare(passed: Tensor, head: LMHead) -> None:
        with torch.autocast(passed.device.type, dtype=dtype, enabled=enabled):
            raw = _linear(inner, passed, head)
        if theirs.shape != raw.shape:
            shapes = f"{tuple(theirs.shape)}, its head's weight gives {tuple(raw.shape)}"
            raise unsupported(inner, f"returns logits of shape {shapes}")
        _compare(inner, head, raw, theirs)

    with torch.no_grad(), eval_mode(model):
        outputs, call = run_with_head(model, sample_inputs, _ladder)
        theirs, (enabled, dtype) = logits_of(outputs), call.autocast
        with_head(model, call.passed, compare)


def _ladder(hidden: Tensor) -> Tensor:
    gains = torch.tensor(_GAINS, dtype=hidden.dtype, device=hidden.device)
    return hidden[:, :1] * gains[None, :, None]


def _linear(inner: nn.Module, hidden: Tensor, head: LMHead) -> Tensor:
    full = getattr(head.weight, "full_tensor", None)
    try:
        return F.linear(hidden, head.weight if full is None else full(), head.bias)
    except RuntimeError as error:
        raise unsupported(inner, f"its output head is not one matrix product ({error})") from error


def _compare(inner: nn.Module, head: LMHead, raw: Tensor, theirs: Tensor) -> None:
    """Compare the rows of the ladder one by one: roundings are relative, so each row has a bound of its own."""
    eps = max(torch.finfo(raw.dtype).eps, torch.finfo(theirs.dtype).eps)
    wide = torch.promote_types(raw.dtype, torch.float32)
    spread = 0.0
    for k in range(raw.shape[1]):
        ours, other = head.post(raw[:, k].to(wide)), theirs[:, k].to(wide)
        if not (torch.isfinite(ours).all() and torch.isfinite(raw[:, k]).all()):
            # Half precision overflows at the larger factors. Factor 1 must not: it is the model's own activation.
            if k == 0:
                raise unsupported(inner, "gives non-finite logits on the sample inputs, so its head cannot be checked")
            break
        difference, size = (ours - other).abs().max().item(), other.abs().max().item()
        spread = max(spread, raw[:, k].abs().max().item())
        if not difference <= 4 * eps * max(size, ours.abs().max().item()):
            raise unsupported(
                inner,
                f"its logits differ from those of its head's weight with its config's scale {head.logit_scale:.6g} and "
                f"softcap {head.logit_softcap} by {difference:.3g}, at logits up to {size:.3g}",
            )
    if spread < 1.0:
        raise unsupported(inner, f"its logits stay within {spread:.3g}, which is too small to check its head")
