# SPDX-License-Identifier: Apache-2.0
"""The LM head of a causal LM: its own parameters, with the scale and softcap that the config declares."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wrappers import find_head, text_config, unsupported

_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")

# `logits_scaling` divides the logits (Granite and its relatives), except for these, which multiply by it.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)

# MiniCPM3 applies its scale before the head. MPT declares a scale that its forward ignores.
_SCALE_NOT_AFTER_HEAD = ("minicpm3", "mpt")


@dataclass(frozen=True, eq=False)
class LMHead:
    """The LM head of a causal LM: logits = cap(logit_scale * (hidden @ weight.T + bias)).

    cap(x) is logit_softcap * tanh(x / logit_softcap), or x without a softcap. `weight` and `bias` are the model's own
    parameters, so gradients arrive where the optimizer looks, and tied embeddings stay tied.

    A model that divides its logits (Granite) has logit_scale = 1 / divisor. For powers of two this is exact. Otherwise
    it differs from the quotient by at most the last bit, which is less than another order of summation changes.

    Attributes:
        weight: (V, H) float. Under tensor parallelism a DTensor with placements (Shard(0),).
        bias: (V,) float, or None.
        logit_scale: the factor of the logits.
        logit_softcap: the softcap of the logits, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `linear_step_pref_loss` and the other `linear_` functions, beside the weight.

        These are `bias`, `logit_scale`, `logit_softcap`, and under tensor parallelism `tp_group`.
        """
        options = {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}
        mesh = getattr(self.weight, "device_mesh", None)
        if mesh is not None:
            options["tp_group"] = mesh.get_group()
        return options

    def post(self, raw: Tensor) -> Tensor:
        """Apply scale and softcap to the matrix product.

        Args:
            raw: (..., V) float: hidden @ weight.T + bias.

        Returns:
            (..., V) logits in the dtype of `raw`.
        """
        scaled = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return scaled if self.logit_softcap is None else self.logit_softcap * torch.tanh(scaled / self.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute all logits. This is the reference expression, which stores them.

        Args:
            hidden: (..., H) float; it is cast to the weight's dtype.

        Returns:
            (..., V) logits in the weight's dtype.
        """
        return self.post(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))


def model_head(model: nn.Module) -> LMHead:
    """Return the LM head of a causal LM, wrapped or not.

    Call it at each step, after `forward_hidden`. PEFT's `modules_to_save` has its active copy only then (the original
    under `disable_adapter()`), and FSDP2 holds a plain weight only from a forward to its backward.

    Args:
        model: a Hugging Face causal LM, as it is or inside PEFT, DDP or FSDP2.

    Returns:
        The head's own parameters, with the scale and softcap of the model's config.

    Raises:
        UnsupportedHead: if the model has no output embeddings, an adapter on its head, virtual prompt tokens, or a
            quantised, offloaded or sharded weight.

    Examples:
        >>> head = model_head(model)
        >>> head.weight is model.get_output_embeddings().weight
        True
    """
    inner, head = find_head(model)
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(head, BaseTunerLayer):
            raise unsupported(
                inner,
                f"has an adapter on its output head ({type(head).__name__}), which the head's weight alone leaves out",
                "merge it, or train the head through modules_to_save",
            )
    weight = _checked_parameter(inner, head, "weight", 2)
    bias = None if getattr(head, "bias", None) is None else _checked_parameter(inner, head, "bias", 1)
    scale, softcap, vocabulary = head_map(inner)
    if vocabulary is not None and vocabulary < weight.shape[0]:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return LMHead(weight, bias, scale, softcap)


def _checked_parameter(inner: nn.Module, head: nn.Module, name: str, ndim: int) -> Tensor:
    """The head's `name`, a whole float tensor of `ndim` dimensions."""
    weight = getattr(head, name, None)
    what = f"its output head's {name} ({type(head).__name__})"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise unsupported(inner, f"{what} is {came}, expected a float tensor (quantised?)")
    if weight.is_meta:
        raise unsupported(inner, f"{what} is offloaded (on the meta device)", "keep the head on one device")
    placements = getattr(weight, "placements", None)
    if placements is not None:
        from torch.distributed.fsdp import FSDPModule

        # FSDP2 and tensor parallelism both leave a DTensor, but only tensor parallel ranks see the same tokens.
        if any(isinstance(module, FSDPModule) for module in inner.modules()):
            raise unsupported(
                inner,
                f"{what} is sharded by FSDP2 here",
                "take it after the forward, with reshard_after_forward=False at the head or after model.unshard()",
            )
        if ndim != 2 or len(placements) != 1 or not placements[0].is_shard(0):
            raise unsupported(inner, f"{what} is a DTensor {placements}, expected a weight with (Shard(0),)")
    if weight.ndim != ndim or weight.numel() == 0:
        raise unsupported(
            inner,
            f"{what} has shape {tuple(weight.shape)} here (sharded by ZeRO-3?)",
            "gather it first (deepspeed.zero.GatheredParameters)",
        )
    return weight


def head_map(inner: nn.Module) -> tuple[float, float | None, int | None]:
    """(scale, softcap, number of vocabulary entries that the logits keep), as the text config declares them."""
    config = text_config(inner)
    kind = getattr(config, "model_type", None)

    def number(field: str) -> float | None:
        value = getattr(config, field, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
            raise unsupported(inner, f"has {field}={value!r} in its config, expected a finite number other than 0")
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
