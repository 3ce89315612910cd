# SPDX-License-Identifier: Apache-2.0
"""A made-up example on which a way to share contexts is held against separate forwards.

A wrong mask, a hole in a cache that a sliding window counts, or positions that a model computes by itself give numbers
that look right. So a way is used for a model only if it gives the log-probs of separate forwards on this example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hf.forward import logits_of
from ..hf.wrappers import eval_mode, model_device, model_dtype, takes, unwrap

_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


class Example(NamedTuple):
    """Sequences that are the beginnings of two trunks, each with the same tail behind it."""

    trunks: list[list[int]]
    cuts: list[tuple[int, int]]  # (trunk, how many of its tokens)
    tail: list[int]

    @property
    def sequences(self) -> list[list[int]]:
        return [[*self.trunks[trunk][:cut], *self.tail] for trunk, cut in self.cuts]


def difference(model: nn.Module, window: int | None, run: Callable[[Example], Tensor]) -> str | None:
    """Compare `run` with separate forwards; return what differs, or None.

    `run` gives the log-probs of the tail's tokens, sequence after sequence. With a `window` the sequences are longer.
    """
    example = _example(model, 21 if window is None else window + 13)
    with torch.no_grad(), eval_mode(model), _plain(model), _head_dtypes(model) as dtypes:
        try:
            alone = [tail_logps(run_model(model, [ids])[0], example.tail) for ids in example.sequences]
            expected = torch.stack(alone)
            got = run(example).view_as(expected)
        except _FAILURES as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    found = float((got - expected).abs().max())
    # A wrong mask changes a log-prob by as much as another context does; `spread` measures that.
    spread = float((expected - expected[:1]).abs().max())
    # Norms and softmaxes of a float64 model round to float32.
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
    bound = max(32 * eps, min(4 * eps**0.5, 0.1 * spread))
    if not found <= bound:
        return f"its log-probs differ from separate forwards by {found:.2g} on an example (bound {bound:.2g})"
    return None


def run_model(model: nn.Module, ids: Any, **inputs: Any) -> Tensor:
    """Return the model's (B, T, V) logits without a cache, and without the positions of virtual tokens."""
    tokens = torch.as_tensor(ids, device=model_device(model))
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        inputs["output_router_logits"] = False  # the balance loss is not needed here, and fails on 4-D masks
    return logits_of(model(input_ids=tokens, **inputs))[:, -tokens.shape[1] :]


def tail_logps(logits: Tensor, tail: list[int]) -> Tensor:
    """Return the (len(tail),) log-probs of a sequence's last tokens from its (T, V) logits."""
    logits = logits[-len(tail) - 1 : -1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps[torch.arange(len(tail)), tail]


def _example(model: nn.Module, length: int) -> Example:
    get = getattr(model, "get_input_embeddings", None)
    vocab = 8 if get is None else get().weight.shape[0]

    def made_up(n: int, seed: int) -> list[int]:
        # From the middle of the vocabulary, where no special tokens are.
        return [vocab // 2 + (seed * 7 + i * i * 5 + i * 3) % max(vocab // 3, 1) for i in range(n)]

    cuts = [(0, 4), (0, length // 2), (0, length), (1, 3), (1, length - 8)]
    return Example([made_up(length, 1), made_up(length - 8, 2)], cuts, made_up(5, 3))


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
