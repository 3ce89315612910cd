"""Hidden states and the output head of any Hugging Face causal LM, without copying or patching a `forward`.

The outer (PEFT, DDP, FSDP2) model runs as usual while a temporary pre-hook on its output embeddings keeps what the head
was about to read and hands it one position instead. Everything around the head (router losses, casts, communication)
stays the model's own; the logits of the other positions are never computed. `check_head` holds the logits that remain
against our scale and softcap, once, at the start.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wrappers import _find_head, _unsupported

_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")

# `logits_scaling` divides the logits (Granite and its relatives), except where it multiplies them. MiniCPM3 has used it
# up before its head; MPT declares a scale that its forward ignores.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)

_SCALE_NOT_AFTER_HEAD = ("minicpm3", "mpt")


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(x) = logit_softcap * tanh(x / logit_softcap) or x.

    `weight` and `bias` are the model's own parameters, so gradients land where the optimizer looks and tied embeddings
    stay tied. A model that divides its logits (Granite) has logit_scale 1/divisor: the same for powers of two, else
    within one last bit of the quotient, less than another order of summation in the product changes.
    """

    weight: Tensor  # (V, H) float; under tensor parallelism a DTensor with placements (Shard(0),)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments beside the weight of `linear_step_pref_loss`, `linear_step_logps` and their like."""
        options = {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}
        if hasattr(self.weight, "device_mesh"):
            options["tp_group"] = self.weight.device_mesh.get_group()
        return options

    def post(self, raw: Tensor) -> Tensor:
        """(..., V) what the head's matrix product gives -> the logits the model means; same dtype."""
        scaled = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return scaled if self.logit_softcap is None else self.logit_softcap * torch.tanh(scaled / self.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) in the weight's dtype: the reference expression, which stores all of the logits."""
        return self.post(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))


def model_head(model: nn.Module) -> LMHead:
    """The output head of a causal LM, wrapped or not: its parameters as they are, scale and softcap from its config.

    Call it each step, after `forward_hidden`: PEFT's modules_to_save resolve to the copy that is active now (the
    original under `disable_adapter()`), and FSDP2 holds a plain weight only from a forward to its backward.

    Raises:
        UnsupportedHead: no output embeddings; an adapter on the head; virtual prompt tokens; a quantised, offloaded or
            sharded weight.
    """
    inner, head = _find_head(model)
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(head, BaseTunerLayer):
            raise _unsupported(
                inner,
                f"has an adapter on its output head ({type(head).__name__}), which the head's weight alone leaves out",
                "merge it, or train the head through modules_to_save",
            )
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    _check_weight(inner, head, weight)
    if bias is not None:
        _check_weight(inner, head, bias, "bias", 1)
    scale, softcap, vocabulary = _head_map(inner)
    if vocabulary is not None and vocabulary < weight.shape[0]:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return LMHead(weight, bias, scale, softcap)


def _check_weight(inner: nn.Module, head: nn.Module, weight: Any, name: str = "weight", ndim: int = 2) -> None:
    what = f"its output head's {name} ({type(head).__name__})"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise _unsupported(inner, f"{what} is {came}, expected a float tensor (quantised?)")
    if weight.is_meta:
        raise _unsupported(inner, f"{what} is offloaded (on the meta device)", "keep the head on one device")
    if hasattr(weight, "placements"):
        from torch.distributed.fsdp import FSDPModule

        # FSDP2 and tensor parallelism leave the same type. Only the latter's ranks see the same tokens.
        if any(isinstance(module, FSDPModule) for module in inner.modules()):
            raise _unsupported(
                inner,
                f"{what} is sharded by FSDP2 here",
                "take it after the forward, with reshard_after_forward=False at the head or after model.unshard()",
            )
        if ndim != 2 or len(weight.placements) != 1 or not weight.placements[0].is_shard(0):
            raise _unsupported(inner, f"{what} is a DTensor {weight.placements}, expected a weight with (Shard(0),)")
    if weight.ndim != ndim or weight.numel() == 0:
        raise _unsupported(
            inner,
            f"{what} has shape {tuple(weight.shape)} here (sharded by ZeRO-3?)",
            "gather it first (deepspeed.zero.GatheredParameters)",
        )


def _head_map(inner: nn.Module) -> tuple[float, float | None, int | None]:
    """(scale, softcap, number of vocabulary entries that logits keep) as the text config declares them."""
    config = getattr(inner, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", None)

    def number(field: str) -> float | None:
        value = getattr(config, field, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
            raise _unsupported(inner, f"has {field}={value!r} in its config, expected a finite number other than 0")
        return float(value)

    softcap = next((v for v in map(number, _SOFTCAP_FIELDS) if v is not None), None)
    scale = None
    if kind not in _SCALE_NOT_AFTER_HEAD:
        scale = next((v for v in map(number, _SCALE_FIELDS) if v is not None), None)
        scaling = number("logits_scaling")
        if scale is None and scaling is not None:
            scale = scaling if kind in _MULTIPLY_BY_LOGITS_SCALING else 1.0 / scaling
    vocabulary = getattr(config, "unpadded_vocab_size", None)
    return 1.0 if scale is None else scale, softcap, vocabulary
