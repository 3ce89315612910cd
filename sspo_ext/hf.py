"""Hidden states and the output head of any Hugging Face causal LM, without copying or patching a `forward`.

The outer (PEFT, DDP, FSDP2) model runs as usual while a temporary pre-hook on its output embeddings keeps what the head
was about to read and hands it one position instead. Everything around the head (router losses, casts, communication)
stays the model's own; the logits of the other positions are never computed. `check_head` holds the logits that remain
against our scale and softcap, once, at the start.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# `logits_scaling` divides the logits (Granite and its relatives), except where it multiplies them. MiniCPM3 has used it
# up before its head; MPT declares a scale that its forward ignores.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
_SCALE_NOT_AFTER_HEAD = ("minicpm3", "mpt")
# Virtual tokens of these come before the text in the logits.
_PREPENDS_POSITIONS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")
# Gains of the self-check: from the activations as they are to far above any softcap.
_GAINS = (1.0, 8.0, 64.0, 512.0, 4096.0, 32768.0)
_WAY_OUT = "use route='logits'"


class UnsupportedHead(ValueError):
    """The logits are not softcap(scale * (hidden @ weight.T + bias)) of a plain weight; says why, and a way out."""


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


def forward_hidden(model: nn.Module, **inputs: Any) -> tuple[Tensor, Any]:
    """Run the model and return what its head reads, with gradient, and the model's outputs.

    Equal to `model(**inputs, use_cache=False)` in every way but one: the head computes the first position only, so
    `outputs.logits` is (B, 1, V). Router losses and whatever else the model returns are in `outputs`.

    Args:
        model: the outermost module (PEFT, DDP, FSDP2, ...), so that its wrappers' own hooks run.
        **inputs: input_ids (or inputs_embeds), attention_mask, position_ids, ... No labels, from which the model would
            compute a loss of its own; no logits_to_keep.

    Returns:
        hidden: (B, T, H), in the dtype and on the device in which the head would have read it. Multiply it with the
            weight of `model_head` after this call; calling the head module itself again breaks FSDP2.
        outputs: what the model returned.

    Raises:
        TypeError: labels, use_cache=True or logits_to_keep among the inputs.
        UnsupportedHead: compiled as a whole; head not called exactly once; other positions than the inputs have.

    Example::

        >>> hidden, outputs = forward_hidden(model, input_ids=ids, attention_mask=mask)
        >>> head = model_head(model)
        >>> linear_step_pref_loss(hidden, head.weight, layout, pairs, **head.options).loss.backward()
    """
    outputs, tap = _run(model, inputs, _first_position)
    return tap.hidden, outputs


def forward_logits_at(
    model: nn.Module, positions: Tensor, *, use_cache: bool = False, **inputs: Any
) -> tuple[Tensor, Any]:
    """Run the model with its head at some positions only: their logits, with the model's own scale and softcap.

    Args:
        model, **inputs: as for `forward_hidden`.
        positions: (N,) int64 on the model's device, into the flattened (B * T) positions; any order, repeats allowed.
        use_cache: ask the model for its cache, which is then in `outputs.past_key_values`.

    Returns:
        logits: (N, V), equal to `model(**inputs).logits.flatten(0, 1)[positions]`.
        outputs: what the model returned.

    Raises:
        TypeError, UnsupportedHead: as `forward_hidden`.
    """
    outputs, _ = _run(model, inputs, lambda hidden: hidden.flatten(0, 1)[positions][None], use_cache)
    return (outputs.logits if hasattr(outputs, "logits") else outputs[0])[0], outputs


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


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face or PEFT model inside DDP, FSDP1, DeepSpeed and torch.compile wrappers, or the model itself."""
    while True:
        for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
            if name in model._modules and not hasattr(type(model), "get_output_embeddings"):
                model = model._modules[name]
                break
        else:
            return model


class _Tap:
    """Forward pre-hook of the head: keeps its input and passes on what `narrow` makes of it."""

    def __init__(self, narrow: Callable[[Tensor], Tensor]):
        self.narrow, self.calls, self.thread = narrow, 0, threading.get_ident()
        self.hidden: Tensor | None = None
        self.passed: Tensor | None = None
        self.autocast: tuple[bool, torch.dtype] | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Another thread's call of a shared model (generation beside training) is not ours to narrow.
        if threading.get_ident() != self.thread:
            return None
        self.calls += 1
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return None
        self.hidden, device = args[0], args[0].device.type
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.passed = self.narrow(args[0])
        return (self.passed, *args[1:]), kwargs


def _first_position(hidden: Tensor) -> Tensor:
    return hidden[:, :1]


def _ladder(hidden: Tensor) -> Tensor:
    gains = torch.tensor(_GAINS, dtype=hidden.dtype, device=hidden.device)
    return hidden[:, :1] * gains[None, :, None]


def _run(
    model: nn.Module, inputs: dict[str, Any], narrow: Callable[[Tensor], Tensor], use_cache: bool = False
) -> tuple[Any, _Tap]:
    for name in ("labels", "logits_to_keep", "num_logits_to_keep"):
        if inputs.get(name) is not None:
            raise TypeError(f"{name}: expected no such input, since the head computes one position only")
    if inputs.get("use_cache"):
        raise TypeError("use_cache: expected False or nothing, since a training forward keeps no cache")
    inner, head = _find_head(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    parameters = inspect.signature(base.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs = {**inputs, "use_cache": use_cache}
    tap = _Tap(narrow)
    # Appended, not prepended: wrappers' hooks (FSDP2's cast and all-gather) come first, so we see what the head would.
    handle = head.register_forward_pre_hook(tap, with_kwargs=True)
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    if tap.calls != 1:
        raise _unsupported(base, f"called its output embeddings {tap.calls} times in one forward (compiled code: 0)")
    if tap.hidden is None:
        raise _unsupported(base, "gave its output embeddings something other than one (B, T, H) tensor")
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if isinstance(tokens, Tensor) and tap.hidden.shape[:2] != tokens.shape[:2]:
        shapes = f"{tuple(tap.hidden.shape)} for inputs of shape {tuple(tokens.shape)}"
        raise _unsupported(base, f"has hidden states of shape {shapes} (virtual prompt tokens?)")
    return outputs, tap


def _find_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(Hugging Face or PEFT model, its output embeddings), after the checks that need no weight."""
    if isinstance(model, nn.DataParallel):
        raise _unsupported(model, "runs replicas of the model in threads", "use DistributedDataParallel")
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
        raise _unsupported(model, "with static_graph=True reduces gradients only through its own outputs", "unset it")
    inner = unwrap(model)
    if "_fsdp_wrapped_module" in model._modules:
        # Its options decide whether the weight is whole after a forward, and not on all ranks alike.
        raise _unsupported(inner, "is wrapped in FSDP1", "use FSDP2 (fully_shard)")
    for module in (model, inner):
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise _unsupported(
                inner,
                "is compiled as a whole, and a graph compiled earlier ignores a new hook",
                "compile its decoder (model.model.compile()) or its layers instead",
            )
    for config in getattr(inner, "peft_config", {}).values():
        kind = getattr(config, "peft_type", None)
        if getattr(kind, "value", kind) in _PREPENDS_POSITIONS:
            raise _unsupported(inner, f"prepends virtual tokens to the logits ({getattr(kind, 'value', kind)})")
    get = getattr(inner, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, nn.Module):
        raise _unsupported(inner, "has no output embeddings (get_output_embeddings() gives none)")
    return inner, head


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _unsupported(model: nn.Module, what: str, way_out: str | None = None) -> UnsupportedHead:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return UnsupportedHead(f"{type(model).__name__}: {what}; {f'{way_out}, or ' if way_out else ''}{_WAY_OUT}")
