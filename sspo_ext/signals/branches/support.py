"""Which engine of `branches` a model supports: refusals that are known, and a check against separate forwards.

A wrong mask, a hole in a cache that a sliding window counts, or positions that a model works out by itself give numbers
that look right. So an engine is used for a model only after it has given the same log-probs as separate forwards on one
example, once for each model and engine. The answer is kept as long as the model lives.
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
from ...hf.wrappers import eval_mode, unwrap
from .branch import ENGINES, Branch
from .engines import run_engine
from .masks import BOOL_MASK, FLOAT_MASK, FULL, SLIDING, attention_of, config_of, is_beyond, window_of
from .model import model_device, model_dtype

logger = logging.getLogger(__name__)

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()

_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def choose_engine(model: nn.Module, engine: str, longest: int = 0, among: Sequence[str] = ENGINES) -> str:
    """The engine to run: the one asked for, or for "auto" the first of `among` that the model supports.

    longest  tokens of the longest path; what is beyond a sliding window is another case. ValueError with the reason if
    the engine was asked for by name and the model does not support it. A warning, once a model, if "auto" is left with
    "separate" though nothing about the model's kind says so.
    """
    check_choice("engine", engine, ("auto", *among))
    refused = {}
    for name in among if engine == "auto" else [engine]:
        reason = why_not(model, name, longest)
        if reason is None:
            break
        refused[name] = reason
    if engine in refused:
        raise ValueError(f"engine: {engine!r} cannot run {_name(model)}: {refused[engine]}")
    if engine == "auto" and name == "separate":
        _tell_of_separate(model, refused, longest)
    return name


def _tell_of_separate(model: nn.Module, refused: dict[str, str], longest: int) -> None:
    config = config_of(model)
    beyond = is_beyond(config, longest)
    if ("told", beyond) in _known[model] or all(_refusal(config, name, beyond) for name in refused):
        return
    _known[model]["told", beyond] = None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    logger.warning("%s: every state is a forward of its own, since no other engine runs it (%s)", _name(model), reasons)


def why_not(model: nn.Module, engine: str, longest: int = 0) -> str | None:
    """None if `engine` ("packed", "cached", "separate") gives this model's log-probs; else why it does not.

    longest  tokens of the longest path that it is to be used for.

    The first question runs the model on a few short made-up sequences; the answer is logged and remembered.
    """
    check_choice("engine", engine, ENGINES)
    if engine == "separate":
        return None
    config = config_of(model)
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
    """ValueError if a path of so many tokens has more than a model with a table of positions (GPT-2, OPT) knows: an
    index error on the host, and on a GPU an assertion that leaves it unusable."""
    inner, words = unwrap(model), None
    if hasattr(inner, "get_input_embeddings"):
        words = inner.get_input_embeddings()
    limit = getattr(config_of(model), "max_position_embeddings", None)
    for module in inner.modules() if isinstance(limit, int) and longest > limit else ():
        table = isinstance(module, nn.Embedding) and module is not words
        if table and module.num_embeddings - getattr(module, "offset", 0) == limit:
            raise ValueError(
                f"trunks: expected at most {limit} tokens with all that is put after them (a probe and its answer, or "
                f"max_new_tokens), which is where the positions of {_name(model)} end, got {longest}"
            )


def _refusal(config: Any, engine: str, beyond: bool) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    attention = attention_of(config)
    if engine == "packed":
        if kinds:
            return f"layers of type {', '.join(sorted(map(str, kinds)))} take no mask of our own"
        # with flex_attention a 4-D tensor is added as a bias, and aborts the process
        if attention not in (*BOOL_MASK, *FLOAT_MASK):
            return f"attention {attention!r} takes no 4-D mask"
        if beyond and getattr(config, "sliding_window", None) is None:
            return "its window is applied inside its layers, by place and not by position"
    elif beyond:
        return "a sliding window counts the places that the mask hides"
    return None


def _self_check(model: nn.Module, engine: str, window: int | None) -> str | None:
    """Log-probs of a few branches of two made-up trunks against separate forwards."""
    vocab = model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else 8
    length = 21 if window is None else window + 13

    def made_up(n: int, seed: int) -> list[int]:
        # from the middle of the vocabulary, where no special tokens are
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
    # What the same token's log-prob changes by from context to context is what a wrong mask would change it by.
    spread = float((expected.view(len(cuts), -1) - expected.view(len(cuts), -1)[:1]).abs().max())
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    bound = max(32 * eps, min(4 * eps**0.5, 0.1 * spread))
    if not difference <= bound:
        return f"its log-probs differ from separate forwards by {difference:.2g} on an example (bound {bound:.2g})"
    return None


def _plain(model: nn.Module) -> contextlib.AbstractContextManager:
    """Without autocast, whose rounding would hide what the check looks for; with it where dtypes are mixed, which only
    autocast may bring together."""
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        return contextlib.nullcontext()
    return torch.autocast(model_device(model).type, enabled=False)


@contextlib.contextmanager
def _head_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """The weights' dtype, and those in which the head gives logits: accelerate puts autocast into the model's own
    forward, where nobody outside can see it or turn it off."""
    dtypes = {model_dtype(model)}
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        yield dtypes
        return
    hook = head.register_forward_hook(lambda module, args, logits: dtypes.add(logits.dtype))
    try:
        yield dtypes
    finally:
        hook.remove()


def _name(model: nn.Module) -> str:
    inner = unwrap(model)
    return type(inner.get_base_model() if hasattr(inner, "get_base_model") else inner).__name__
