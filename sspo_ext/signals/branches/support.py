# SPDX-License-Identifier: Apache-2.0
"""Which engines a model supports: known refusals, and a check against separate forwards.

A wrong mask, a hole in a cache that a sliding window counts, or positions that a model computes by itself give numbers
that look right. So an engine is used for a model only if it gives the log-probs of separate forwards on an example. The
example runs once for each model and engine, and its result is kept as long as the model lives.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..._checks import check_choice
from ...hf.wrappers import base_model, eval_mode, text_config, unwrap
from .branch import ENGINES, Branch
from .engines import run_engine
from .masks import BOOL_MASK, FLOAT_MASK, FULL, SLIDING, attention_of, is_beyond, window_of
from .model import model_device, model_dtype

logger = logging.getLogger(__name__)

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()

_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def choose_engine(model: nn.Module, engine: str, longest: int = 0, among: Sequence[str] = ENGINES) -> str:
    """Return the engine to run: `engine` itself, or for "auto" the first of `among` that the model supports.

    `longest` is the number of tokens of the longest path; beyond a sliding window other engines may be supported. An
    engine that was asked for by name and is not supported raises ValueError with the reason. If "auto" ends with
    "separate" and the model's kind does not explain why, a warning is logged once for the model.
    """
    check_choice("engine", engine, ("auto", *among))
    refused: dict[str, str] = {}
    chosen = engine
    for chosen in among if engine == "auto" else [engine]:
        reason = why_not(model, chosen, longest)
        if reason is None:
            break
        refused[chosen] = reason
    if engine in refused:
        raise ValueError(f"engine: {engine!r} cannot run {_name(model)}: {refused[engine]}")
    if engine == "auto" and chosen == "separate":
        _warn_of_separate(model, refused, longest)
    return chosen


def _warn_of_separate(model: nn.Module, refused: dict[str, str], longest: int) -> None:
    config = text_config(model)
    beyond = is_beyond(config, longest)
    if ("warned", beyond) in _known[model] or all(_refusal(config, name, beyond) for name in refused):
        return
    _known[model]["warned", beyond] = None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    logger.warning("%s: each path takes a forward of its own, as no other engine runs it (%s)", _name(model), reasons)


def why_not(model: nn.Module, engine: str, longest: int = 0) -> str | None:
    """Tell why an engine of `branch_logps` cannot run a model.

    The first call runs the model on a few short made-up sequences. The answer is logged and kept as long as the model
    lives.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        engine: "packed", "cached" or "separate".
        longest: the number of tokens of the longest path that the engine shall run. It matters for models with a
            sliding window.

    Returns:
        None if the engine gives this model's log-probs, else the reason.

    Raises:
        ValueError: if the engine is unknown.

    Examples:
        >>> reason = why_not(model, "packed")  # None if the model supports it
    """
    check_choice("engine", engine, ENGINES)
    if engine == "separate":
        return None
    config = text_config(model)
    beyond = is_beyond(config, longest)
    key = (engine, beyond, attention_of(config), model_device(model), model_dtype(model))
    known = _known.setdefault(model, {})
    if key not in known:
        reason = _refusal(config, engine, beyond)
        known[key] = _self_check(model, engine, window_of(config) if beyond else None) if reason is None else reason
        if known[key] is not None:
            logger.info("engine %s cannot run %s: %s", engine, _name(model), known[key])
    return known[key]


def check_positions(model: nn.Module, longest: int) -> None:
    """Raise ValueError if a path of `longest` tokens does not fit into the model's table of positions (GPT-2, OPT).

    Without this check it is an index error on the host; on a GPU it is an assertion that leaves the device unusable.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return
    inner = unwrap(model)
    get = getattr(inner, "get_input_embeddings", None)
    words = None if get is None else get()
    for module in inner.modules():
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        offset: Any = getattr(module, "offset", 0)
        if module.num_embeddings - offset == limit:
            raise ValueError(
                f"trunks: expected at most {limit} tokens with all that follows them (a probe and its answer, or "
                f"max_new_tokens), which is where the positions of {_name(model)} end, got {longest}"
            )


def _refusal(config: Any, engine: str, beyond: bool) -> str | None:
    """Return the reason that the model's kind gives against an engine, or None."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    attention = attention_of(config)
    if engine == "packed":
        if kinds:
            return f"layers of type {', '.join(sorted(map(str, kinds)))} take no 4-D mask"
        # flex_attention adds a 4-D tensor as a bias, which aborts the process.
        if attention not in (*BOOL_MASK, *FLOAT_MASK):
            return f"attention {attention!r} takes no 4-D mask"
        if beyond and getattr(config, "sliding_window", None) is None:
            return "its layers apply the window themselves, by place instead of position"
    elif beyond:
        return "a sliding window counts the places that the mask hides"
    return None


def _self_check(model: nn.Module, engine: str, window: int | None) -> str | None:
    """Compare a few branches of two made-up trunks with separate forwards; return what differs, or None."""
    get = getattr(model, "get_input_embeddings", None)
    vocab = 8 if get is None else get().weight.shape[0]
    length = 21 if window is None else window + 13

    def made_up(n: int, seed: int) -> list[int]:
        # From the middle of the vocabulary, where no special tokens are.
        return [vocab // 2 + (seed * 7 + i * i * 5 + i * 3) % max(vocab // 3, 1) for i in range(n)]

    trunks = [made_up(length, 1), made_up(length - 8, 2)]
    tail = made_up(5, 3)
    cuts = ((0, 4), (0, length // 2), (0, length), (1, 3), (1, length - 8))
    branches = [Branch(t, cut, tail, start) for t, cut in cuts for start in (0, 3)]
    with torch.no_grad(), eval_mode(model), _plain(model), _head_dtypes(model) as dtypes:
        expected = run_engine(model, trunks, branches, "separate", 1 << 30).tokens
        try:
            got = run_engine(model, trunks, branches, engine, 1 << 30).tokens
        except _FAILURES as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    difference = float((got - expected).abs().max())
    # A wrong mask changes a log-prob by as much as another context does; `spread` measures that.
    spread = float((expected.view(len(cuts), -1) - expected.view(len(cuts), -1)[:1]).abs().max())
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    bound = max(32 * eps, min(4 * eps**0.5, 0.1 * spread))
    if not difference <= bound:
        return f"its log-probs differ from separate forwards by {difference:.2g} on an example (bound {bound:.2g})"
    return None


def _plain(model: nn.Module) -> contextlib.AbstractContextManager:
    """Turn autocast off, as its rounding would hide errors; but a model of mixed dtypes may need it, so it stays on."""
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        return contextlib.nullcontext()
    return torch.autocast(model_device(model).type, enabled=False)


@contextlib.contextmanager
def _head_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collect the weights' dtype and the dtypes of the head's logits.

    They differ where accelerate puts autocast into the model's own forward: from outside it is neither seen nor turned
    off.
    """
    dtypes = {model_dtype(model)}
    get = getattr(unwrap(model), "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        yield dtypes
        return
    hook = head.register_forward_hook(lambda module, args, logits: dtypes.add(logits.dtype))
    try:
        yield dtypes
    finally:
        hook.remove()


def _name(model: nn.Module) -> str:
    return type(base_model(model)).__name__
