"""The self-check: does the head that was found give the logits that the model gives?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forward import _run
from .head import LMHead, model_head
from .wrappers import _find_head, _unsupported, eval_mode

# Gains of the self-check: from the activations as they are to far above any softcap.
_GAINS = (1.0, 8.0, 64.0, 512.0, 4096.0, 32768.0)


def check_head(model: nn.Module, sample_inputs: dict[str, Any]) -> LMHead:
    """Start-up self-check: does `model_head` describe this model's logits? Returns it if so.

    Runs the model once without gradient (in eval mode, so that no random number is drawn; modes are restored), gives
    its head the first position at several magnitudes, and holds the model's own logits against ours. Catches a scale or
    softcap that the config does not tell or the class does not apply, a vocabulary cut, and a head that is more than a
    matrix. What a model does to the logits of later positions only is not seen.

    Args:
        model: as for `forward_hidden`.
        sample_inputs: keyword arguments of the model, on its device; one short row is enough.

    Raises:
        UnsupportedHead: names the model class and the largest difference; and all that `model_head` and
            `forward_hidden` raise.
    """
    inner, _ = _find_head(model)
    with torch.no_grad(), eval_mode(model):
        outputs, tap = _run(model, sample_inputs, _ladder)
        head = model_head(model)
        theirs = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        with torch.autocast(tap.passed.device.type, dtype=tap.autocast[1], enabled=tap.autocast[0]):
            raw = _linear(inner, tap.passed, head)
        if theirs.shape != raw.shape:
            shapes = f"{tuple(theirs.shape)}, its head's weight gives {tuple(raw.shape)}"
            raise _unsupported(inner, f"returns logits of shape {shapes}")
        _compare(inner, head, raw, theirs)
    # Again, since a weight that PEFT computes (trainable_token_indices) has no gradient when taken under no_grad.
    return model_head(model)


def _ladder(hidden: Tensor) -> Tensor:
    gains = torch.tensor(_GAINS, dtype=hidden.dtype, device=hidden.device)
    return hidden[:, :1] * gains[None, :, None]


def _linear(inner: nn.Module, hidden: Tensor, head: LMHead) -> Tensor:
    weight = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
    try:
        return F.linear(hidden, weight, head.bias)
    except RuntimeError as error:
        raise _unsupported(inner, f"its output head is not one matrix product ({error})") from error


def _compare(inner: nn.Module, head: LMHead, raw: Tensor, theirs: Tensor) -> None:
    """Rows of the ladder one by one: the roundings of the model's own map are relative, so each row has a bound."""
    eps = max(torch.finfo(raw.dtype).eps, torch.finfo(theirs.dtype).eps)
    wide = torch.promote_types(raw.dtype, torch.float32)
    spread = 0.0
    for k in range(raw.shape[1]):
        ours, other = head.post(raw[:, k].to(wide)), theirs[:, k].to(wide)
        if not (torch.isfinite(ours).all() and torch.isfinite(raw[:, k]).all()):
            # Half precision overflows up the ladder. The first row has the activations as they are.
            if k == 0:
                raise _unsupported(inner, "gives non-finite logits on the sample inputs, so its head cannot be checked")
            break
        difference, size = (ours - other).abs().max().item(), other.abs().max().item()
        spread = max(spread, raw[:, k].abs().max().item())
        if not difference <= 4 * eps * max(size, ours.abs().max().item()):
            raise _unsupported(
                inner,
                f"its logits differ from those of its head's weight with its config's scale {head.logit_scale:.6g} and "
                f"softcap {head.logit_softcap} by {difference:.3g}, at logits up to {size:.3g}",
            )
    if spread < 1.0:
        raise _unsupported(inner, f"its logits stay within {spread:.3g}, too small to check its head by")
