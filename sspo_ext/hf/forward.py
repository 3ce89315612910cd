"""A model's hidden states, or its logits at some positions, from one call of the outermost model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import _find_head, _unsupported


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
